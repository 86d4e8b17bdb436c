"""Votes of a store bounded again: equal to a fresh certificate of the same votes, and refused where that is false."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from conftest import QUIET, one_sentence, records, run_main, run_task
from gsmooth_lightning.certify import (
    ABSTAIN,
    AdditiveCertifier,
    EnumerationCertifier,
    JointCertifier,
)
from gsmooth_lightning.certify.rebound import check_reboundable, rebound
from gsmooth_lightning.error import Bound
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.plans import ConfidenceSequence, FixedN, GroupSequential, SoftVotes
from gsmooth_lightning.report.curves import certified, for_label
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, Gaussian, Laplace
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Brightness, GaussianBlur, Rotation
from plans import Given, finish

X = (torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 6, 6))) / 255).float()
ROTATION = TransformationThreat(Rotation(), -9, 9)
ERROR = Given(Bound(0.3, 0.01, 1e-4, "heuristic"))

CASES = {
    "pixels": (AdditiveCertifier, {"noise": Gaussian(0.3)}, PixelThreat()),
    "floats, l1": (AdditiveCertifier, {"noise": Laplace(0.3)}, PixelThreat("float", norm="l1")),
    "brightness": (
        AdditiveCertifier,
        {"transform": Brightness(), "law": Gaussian(0.3), "noise": Gaussian(0.01)},
        TransformationThreat(Brightness(), -0.2, 0.5, saved="real"),
    ),
    "blur": (
        AdditiveCertifier,
        {"transform": GaussianBlur(), "law": Exponential(0.1), "noise": Gaussian(0.2)},
        TransformationThreat(GaussianBlur(), 0, 9),
    ),
    "rotation": (
        lambda plan, top_k=1: JointCertifier(plan, ERROR, top_k),
        {"transform": Rotation(), "law": Gaussian(9.0), "noise": Gaussian(0.3)},
        ROTATION,
    ),
}


class Voted(SmoothedClassifier):
    """Draws nothing: returns the given votes of a stage."""

    def sample(self, x, stream, stage, first, last):
        return np.array(self.votes_of[stage])
        yield


def certificate(name, votes, **arguments):
    """A certificate of given votes, as a record, with the certifier, classifier and threat."""
    make, parts, threat = CASES[name]
    smoothed = Voted(nn.Identity(), 4, block=32, **parts).eval()
    smoothed.votes_of = {"select": [*votes[0], 0], "estimate": [*votes[1], 0]}
    top_k = arguments.pop("top_k", 1)
    plan = FixedN(sum(votes[0]), sum(votes[1]), **arguments)
    certifier = make(plan, top_k=top_k)
    found = finish(certifier.procedure(smoothed, threat, X, Stream(0, 0)))
    record = json.loads(json.dumps({"index": 0, **asdict(found)}))  # as a store keeps it
    return record, certifier, smoothed, threat


VOTES = [([60, 40, 0, 0], [700, 250, 50, 0]), ([9, 1, 0, 0], [990, 10, 0, 0]), ([3, 7, 0, 0], [500, 450, 49, 1])]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("votes", VOTES)
def test_bounded_again_is_as_if_certified_like_that(name, votes):
    """Every plan's record, bounded again as every other plan, equals that plan's own record."""
    plans = [
        {"alpha": a, "bounds": b, "top_k": k}
        for a, b in itertools.product((1e-3, 0.05), ("binary", "two"))
        for k in (1, 2)
    ]
    made = [certificate(name, votes, **plan) for plan in plans]
    for (record, *_), (wanted, certifier, smoothed, threat) in itertools.product(made, made):
        assert rebound(record, certifier, smoothed, threat) == wanted
    assert len({str(record["radius"]) for record, *_ in made}) > 1 or all(r["prediction"] == ABSTAIN for r, *_ in made)


def test_a_label_counts_as_far_as_it_stays_among_the_k():
    record, *_ = certificate("pixels", VOTES[0], top_k=2)
    assert record["prediction"] == [0, 1]
    assert record["radius"][0] > record["radius"][1] > 0
    for label, radius in ((0, record["radius"][0]), (1, record["radius"][1])):
        own = for_label(record | {"label": label})
        assert (own["prediction"], own["radius"]) == (label, radius)
        assert certified([own], radius).all()
        assert not certified([own], radius + 1e-9).any()
    other = for_label(record | {"label": 3})
    assert not certified([other], 0.0).any()
    single, *_ = certificate("pixels", VOTES[0])
    assert for_label(single | {"label": 0}) == single | {"label": 0}


def test_what_cannot_be_bounded_again_is_refused():
    record, certifier, smoothed, threat = certificate("pixels", VOTES[0])
    for plan in (GroupSequential([0.1]), ConfidenceSequence(), SoftVotes()):
        with pytest.raises(RequestError, match="sampling=fixed"):
            check_reboundable(AdditiveCertifier(plan))
    with pytest.raises(RequestError, match="no sampled votes"):
        check_reboundable(EnumerationCertifier())
    check_reboundable(certifier)
    old = record | {"details": {}}
    with pytest.raises(RequestError, match="older version"):
        rebound(old, certifier, smoothed, threat)
    with pytest.raises(RequestError, match="999 draws, not 1000"):
        rebound(record | {"n": 999}, certifier, smoothed, threat)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return run_task("train", *QUIET, *DIGITS, "train.epochs=6", f"store={folder / 'run'}")


DIGITS = (
    "transform=identity",
    "law=none",
    "preprocess=none",
    "error=none",
    "threat=l2",
    "certify=direct",
    "noise.sigma=0.25",
)


def test_report_bounds_again(trained, here, capsys):
    run = (*QUIET, *DIGITS, f"checkpoint={trained}", "sampling.n=400", "images.first=12", "store=run")
    run_task("certify", *run)
    kept = (here / "run" / "records.jsonl").read_bytes()
    table = run_task("report", "stores=[run]", "alpha=0.05", "bounds=two")
    assert "0.05 (of 12 images" in table
    table = run_task("report", "stores=[run]", "top_k=3", "radii=[0]")
    assert "stays among the k most probable" in table
    hits = float(next(line for line in table.splitlines() if line.startswith("certified at 0 l2")).split()[4])
    fixed = sum(r["prediction"] == r["label"] for r in records(here / "run")) / 12
    assert hits >= fixed
    assert (here / "run" / "records.jsonl").read_bytes() == kept
    run_task("certify", *run[:-1], "store=three", "certify.top_k=3")
    own = run_task("report", "stores=[three]", "radii=[0]")
    assert (
        next(line for line in own.splitlines() if line.startswith("certified at 0 l2")).split()[4:]
        == (next(line for line in table.splitlines() if line.startswith("certified at 0 l2")).split()[4:])
    )


def test_report_refuses_what_a_stopped_store_cannot_answer(trained, here):
    options = (*QUIET, *DIGITS, f"checkpoint={trained}", "images.first=3", "store=early")
    run_task("certify", *options, "sampling=sequential", "sampling.radii=[0.1]", "sampling.n=400")
    for change in ("top_k=2", "alpha=0.01", "bounds=two"):
        one_sentence(run_main("report", "stores=[early]", change), "sampling=fixed")
    one_sentence(run_main("certify", *options[:-1], "store=k", "certify.top_k=10"), "not below the number of classes")
    one_sentence(
        run_main("certify", *options[:-1], "store=k", "certify.top_k=2", "sampling=sequential", "sampling.radii=[0.1]"),
        "sampling=fixed",
    )
    assert not (here / "k").exists()
