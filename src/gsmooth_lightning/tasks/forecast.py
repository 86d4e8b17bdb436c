"""`gsmooth certify dry_run=true`: what a run would cost and could show, before anything is spent."""

import copy
import datetime
import math
import resource
import statistics
import sys
import time
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from gsmooth_lightning.certify import Certifier, EnumerationCertifier, FixedN
from gsmooth_lightning.certify.store import check_identity, read
from gsmooth_lightning.error import CalibratedBound
from gsmooth_lightning.lit.certification import rounded_up
from gsmooth_lightning.report.tables import rounded
from gsmooth_lightning.rounds import Procedure, Result, run_rounds
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.tasks.run import Run
from gsmooth_lightning.tasks.setup import images_in_words

ROUNDS = 5
"""Rounds of blocks that are timed, in which the first warms the device up."""

PATIENCE = 10.0
"""Seconds after which no further round is timed."""


def forecast(run: Run, certifier: Certifier) -> dict[str, str]:
    """Rows of a table: images, evaluations, the largest radius, false certificates, time and memory.

    Stated for the first image that is not done: its error bound or slices are computed, and a few of its blocks drawn
    and classified. Nothing is kept or written.

    Raises:
        RequestError: the folder is the store of another run.
    """
    images, done, device = list(run.data.visited.indices), finished(run), run.trainer.strategy.root_device
    left = [i for i in images if i not in done]
    index = (left or images)[0]
    x, stream = run.threat.prepare(run.data.image(index)[None].to(device))[0], Stream(run.cfg.seed, index)
    an_evaluation = seconds_an_evaluation(run, x)  # first, as it warms the device up
    certifier, calibrating = calibrated(run, certifier, x, stream)
    limits, before = timed(certifier.limits(run.smoothed, run.threat, x, stream), device)
    votes = limits.evaluations * an_evaluation
    seconds = math.ceil((calibrating + len(left) * (before + votes)) / run.trainer.world_size)
    radius, calibration = "not known beforehand", ""
    if limits.radius is not None:
        most = rounded(limits.radius, up=True)
        radius = f"at most {most} {run.threat.unit}, by n votes for one class without an interpolation error"
    fixed = isinstance(certifier, EnumerationCertifier) or isinstance(getattr(certifier, "plan", None), FixedN)
    if calibrating:
        calibration = f"; {calibrating:.3g} s of it to calibrate the error bound"
    return {
        "images": f"{len(images)} ({images_in_words(run.cfg)}), {len(images) - len(left)} of them done",
        "what follows is stated for": f"image {index} of shape {tuple(x.shape)}, on {run.identity['device']}",
        "evaluations an image": f"at most {limits.evaluations:,}{limits.beside}"
        + ("" if fixed else "; it may stop earlier"),
        "certified radius": radius,
        "false certificates expected": f"at most {limits.alpha * len(images):.4g} (alpha {limits.alpha:g} an image)",
        "seconds an image": f"{before:.3g} before its votes, at most {votes:.3g} for them",
        "time left": f"about {datetime.timedelta(seconds=seconds)} for {len(left)} images, or less{calibration}",
        "memory": memory(run, x),
    }


def finished(run: Run) -> Collection[int]:
    """Indices of the images that the run's store holds already.

    Raises:
        RequestError: it is another run's.
    """
    if not (run.folder / "fingerprint.json").is_file():
        return ()
    check_identity(run.folder, run.identity)
    return {record["index"] for record in read(run.folder)}


def calibrated(run: Run, certifier: Certifier, x: Tensor, stream: Stream) -> tuple[Certifier, float]:
    """The certifier, and the seconds that its bound's calibration images take. A bound without them is fitted as if all
    of them were the image x: neither alpha nor the number of its parts depend on them."""
    error = certifier.error
    if not isinstance(error, CalibratedBound) or error.fitted is not None:
        return certifier, 0.0
    norms, seconds = timed(error.measure(run.smoothed, run.threat, x, stream), x.device)  # type: ignore[arg-type]
    certifier = copy.deepcopy(certifier)
    certifier.error.fit(  # type: ignore[union-attr]
        dict.fromkeys(range(error.calibration), rounded_up(norms).tolist()), run.smoothed, run.threat
    )
    own = run.folder / "bounds"
    return certifier, seconds * (error.calibration - (len(read(own)) if own.exists() else 0))


def timed(procedure: Procedure[Result], device: torch.device) -> tuple[Result, float]:
    """What a procedure concludes, and the seconds that takes."""
    start = time.perf_counter()
    ((_, found, _),) = run_rounds([(0, procedure)], device)
    return found, time.perf_counter() - start


def seconds_an_evaluation(run: Run, x: Tensor) -> float:
    """Median over rounds of one block for each image in flight, drawn and classified as a run does it."""
    size, at_once = run.smoothed.block, run.cfg.images.in_flight
    taken: list[float] = []
    while len(taken) < ROUNDS and sum(taken) < PATIENCE:
        start, first = time.perf_counter(), len(taken) * size
        votes: list[tuple[int, Any]] = [
            (i, run.smoothed.sample(x, Stream(run.cfg.seed, i), "predict", first, first + size)) for i in range(at_once)
        ]
        list(run_rounds(votes, x.device, at_once))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) / (at_once * size)


def memory(run: Run, x: Tensor) -> str:
    """Sizes of a block's inputs and of the network, and the most that was in use so far."""
    inputs = run.smoothed.block * math.prod(run.smoothed.encoded_shape(x)) * x.element_size()
    weights = sum(t.nbytes for t in (*run.smoothed.base.parameters(), *run.smoothed.base.buffers()))
    if x.is_cuda:
        most, where = torch.cuda.max_memory_allocated(x.device), "on the GPU"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        most, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "by this process"
    sizes = [f"{size / 2**20:.4g} MiB" for size in (inputs, weights, most)]
    return f"{sizes[0]} of inputs a block, {sizes[1]} of weights; at most {sizes[2]} in use so far {where}"
