"""How a command starts and how it ends when the user can put something right."""

import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities import rank_zero_only

from gsmooth_lightning.errors import RequestError

OPTIONAL = ("law", "noise", "error", "denoiser")
"""Groups with an option `none`."""

MOVABLE = ("checkpoint", "denoiser_checkpoint", "surrogate", "learned")
"""Options that name files of weights, whose contents count and not where they lie."""

MISTAKES: tuple[type[Exception], ...] = (RequestError, HydraException, OmegaConfBaseException)
"""What a user can put right."""

RESUMABLE = 130
"""Exit status of an interrupted run; the same command goes on where it stopped."""


def command(name: str, run: Callable[[DictConfig], Any], then: Callable[[Any], object] | None = None) -> None:
    """Composes conf/<name>.yaml with the overrides in sys.argv and runs it, then `then` on what it returns.

    What a user can put right ends in one sentence on stderr and exit status 2; an interruption in 130; anything else is
    a bug and keeps its traceback. Of several processes the first alone prints and does what comes then.
    """
    logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)  # says who died
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it repeats what the one sentence says
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing them

    def job(cfg: DictConfig) -> None:
        with _carried() if _beside_others() else _one_sentence(name):  # before Hydra adds a line of its own
            try:
                result = run(without_leftovers(cfg))
                if then is not None and first_process():
                    then(result)
            except ValueError as failure:
                if isinstance(failure, MISTAKES):
                    raise
                raise RuntimeError(f"a bug: {failure}") from failure  # a plain ValueError is Hydra's, of a composition

    quiet = contextlib.nullcontext() if first_process() else contextlib.redirect_stdout(io.StringIO())
    with quiet, _one_sentence(name, ValueError), _launched():  # Hydra's own, about the composition
        hydra.main(version_base="1.3", config_path="pkg://gsmooth_lightning.conf", config_name=name)(job)()


def without_leftovers(cfg: DictConfig) -> DictConfig:
    """The configuration without an experiment's options of parts that were switched off, such as noise.sigma beside
    noise=none: these parts are null."""
    for group in OPTIONAL:
        if cfg.get(group) is not None and "_target_" not in cfg[group]:
            cfg[group] = None
    return cfg


def first_process() -> bool:
    """Whether this is the only process of a run, or the first of them."""
    return not rank_zero_only.rank  # type: ignore[attr-defined]


def _beside_others() -> bool:
    """Whether this job of a sweep has a process of its own, and others beside it."""
    sweep = HydraConfig.get()
    return sweep.mode == RunMode.MULTIRUN and not sweep.launcher._target_.endswith("BasicLauncher")


@contextlib.contextmanager
def _carried() -> Iterator[None]:
    """Lets a mistake travel to the process that waits for the sweep's jobs: it says it when the others have ended."""
    try:
        yield
    except MISTAKES as failure:
        raise RequestError(sentence(failure)) from None  # pickling drops causes
    except Exception as bug:  # and tracebacks
        bug.add_note(traceback.format_exc())
        raise


@contextlib.contextmanager
def _launched() -> Iterator[None]:
    """Makes a mistake of what a launcher raises: it cannot start, or a job's process has died."""
    try:
        yield
    except RuntimeError as failure:
        *_, (frame, _) = traceback.walk_tb(failure.__traceback__)
        raised_by = (type(failure).__module__, frame.f_globals["__name__"])
        if not any(module.startswith(("submitit", "joblib")) for module in raised_by):
            raise
        reason = " ".join(str(failure).splitlines()[:2])
        raise RequestError(
            f"the sweep's launcher stopped: {reason}; finished images are kept: run the same command again to go on"
        ) from failure


@contextlib.contextmanager
def _one_sentence(name: str, *more: type[Exception]) -> Iterator[None]:
    mistakes = (*MISTAKES, *more)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns an interruption into SystemExit(1)
        by_lightning = isinstance(stop.__context__, KeyboardInterrupt) and getattr(stop, "code", None) == 1
        if isinstance(stop, SystemExit) and not by_lightning:
            raise
        if not first_process():  # the first one's exit status is the run's
            raise SystemExit(0) from None
        print(f"gsmooth {name}: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(RESUMABLE) from None
    except mistakes as failure:
        process = "" if first_process() else f" (process {rank_zero_only.rank})"  # type: ignore[attr-defined]
        print(f"gsmooth {name}{process}: {sentence(failure)}", file=sys.stderr)
        raise SystemExit(2) from None


def sentence(failure: BaseException) -> str:
    """The user's mistake in one line: the innermost request error, or the first lines of a configuration error."""
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, RequestError):  # one from a loader's process comes with the traceback in its text
            return str(cause).rsplit("RequestError: ", 1)[-1].strip()
        cause = cause.__cause__
    if isinstance(failure.__cause__, ImportError):
        return f"{str(failure).rsplit('full_key: ', 1)[-1].strip()}: {' '.join(str(failure.__cause__).split())}"
    if isinstance(failure.__cause__, TypeError):  # Hydra called a constructor with an option it does not know
        key = str(failure).rsplit("full_key: ", 1)[-1].strip()
        return f"{key}: {failure.__cause__}; correct the options of {key}"
    if type(failure) is ValueError:
        return f"{failure} (in {' '.join(sys.argv[1:])})"
    text = str(failure).replace("\n\t", " ").replace("\n", " ")
    text = " ".join(text.split())
    if "Could not find 'hydra/launcher/" in text:
        text += "; install the launchers: pip install 'gsmooth-lightning[launchers]'"
    return text
