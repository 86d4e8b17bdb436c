"""How a command starts and how it ends when the user can put something right."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gsmooth_lightning.errors import RequestError

OPTIONAL = ("law", "noise", "error", "denoiser")
"""Groups with an option `none`."""

RESUMABLE = 130
"""Exit status of an interrupted run; the same command goes on where it stopped."""


def command(name: str, run: Callable[[DictConfig], object]) -> None:
    """Composes conf/<name>.yaml with the overrides in sys.argv and runs it.

    What a user can put right ends in one sentence on stderr and exit status 2; an interruption in 130; anything else is
    a bug and keeps its traceback.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it repeats what the one sentence says
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions to us instead of printing them

    def job(cfg: DictConfig) -> None:
        with _one_sentence(name):  # before Hydra adds a line of its own
            run(without_leftovers(cfg))

    with _one_sentence(name, ValueError):  # Hydra's own, about the composition
        hydra.main(version_base="1.3", config_path="pkg://gsmooth_lightning.conf", config_name=name)(job)()


def without_leftovers(cfg: DictConfig) -> DictConfig:
    """The configuration without an experiment's options of parts that were switched off, such as noise.sigma beside
    noise=none: these parts are null."""
    for group in OPTIONAL:
        if cfg.get(group) is not None and "_target_" not in cfg[group]:
            cfg[group] = None
    return cfg


@contextlib.contextmanager
def _one_sentence(name: str, *more: type[Exception]) -> Iterator[None]:
    mistakes: tuple[type[Exception], ...] = (RequestError, HydraException, OmegaConfBaseException, *more)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns an interruption into SystemExit(1)
        by_lightning = isinstance(stop.__context__, KeyboardInterrupt) and getattr(stop, "code", None) == 1
        if isinstance(stop, SystemExit) and not by_lightning:
            raise
        print(f"gsmooth {name}: interrupted; run the same command again to go on", file=sys.stderr)
        raise SystemExit(RESUMABLE) from None
    except mistakes as failure:
        print(f"gsmooth {name}: {sentence(failure)}", file=sys.stderr)
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
    return " ".join(text.split())
