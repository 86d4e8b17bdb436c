"""`gsmooth predict`: the classifier of a certification run on files, or as a module that runs with torch alone."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from gsmooth_lightning.certify import ABSTAIN, NestedCertifier, PerInputCertifier
from gsmooth_lightning.certify.store import Record, check_identity, read_identity
from gsmooth_lightning.data import Files, ImageData, SpeechCommands
from gsmooth_lightning.data.base import read_image
from gsmooth_lightning.data.speech_commands import read_second
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model.fused import check_runs
from gsmooth_lightning.predict import Exportable, Prediction, Predictor, saved
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.tasks.launch import MOVABLE, command
from gsmooth_lightning.tasks.setup import plain, settings_of, trained_network, voting
from gsmooth_lightning.threat import Threat

MAY_DIFFER = ("device", "versions", "backend")
"""What of a run's identity may be another one here; every line says so."""


def predict(cfg: DictConfig) -> None:
    """Prints or writes the prediction on each file, or writes the module.

    Raises:
        RequestError: among other mistakes: files without a prediction. The others have theirs.
    """
    if (cfg.files is None) == (cfg.export is None):
        raise RequestError("give files=PATH to predict, or export=FILE.pt2 to write a module")
    for target in (cfg.out, cfg.export):
        if target is not None and Path(str(target)).exists():
            raise RequestError(f"{target} exists; name a new file, or remove it")
        if target is not None and not Path(str(target)).parent.is_dir():
            raise RequestError(f"there is no folder for {target}; make it, or name another file")
    folder = Path(str(cfg.run))
    made = reopened(folder, cfg)
    seed = made.seed if cfg.seed is None else cfg.seed
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise RequestError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed!r}")
    reader = Reader(made, device_named(cfg.device))
    if cfg.export is not None:
        export(folder, cfg, made, reader)
        return
    paths = listed(cfg.files, reader.endings)
    smoothed, _, differs = classifier(folder, made, reader, reader.example(paths))
    predictor = Predictor(smoothed, 10_000 if cfg.n is None else cfg.n, cfg.alpha)
    announce(folder, differs)
    same, errors = {"differs": differs} if differs else {}, []
    with lines_to(cfg.out) as write:
        for path, found, seconds in predictions(predictor, reader, paths, seed, made.images.in_flight):
            if isinstance(found, Prediction):
                write({"file": str(path), **record(found, reader.names, seconds), **same})
            else:
                write({"file": str(path), "error": found})
                errors.append(found)
    if errors:
        raise RequestError(f"{len(errors)} of {len(paths)} files have no prediction; {errors[0]}")


def reopened(folder: Path, cfg: DictConfig) -> DictConfig:
    """The configuration of the run in a folder, with the files that have moved where they are now.

    Raises:
        RequestError: no certification there, or one whose classifier does not predict from votes at the input alone.
    """
    made_by = read_identity(folder)["command"]
    if made_by != "certify":
        raise RequestError(f"{folder} was written by `gsmooth {made_by}`; name the folder of a certification")
    made = settings_of(folder)
    for option in MOVABLE:
        if cfg[option] is not None:
            made[option] = cfg[option]
    theorem = get_class(made.certify._target_)
    if issubclass(theorem, NestedCertifier):
        raise RequestError(
            f"{folder} certifies a classifier of nested votes, which draws cannot decide; predict from a run with "
            "certify=joint"
        )
    if issubclass(theorem, PerInputCertifier):
        raise RequestError(
            f"{folder} certifies a classifier that remembers its inputs and chooses a noise for each; predict from a "
            "run with certify=direct"
        )
    return made


def device_named(name: str | None) -> torch.device:
    """The device of that name; by default a GPU, if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError, AssertionError) as failure:
        raise RequestError(f"there is no device {name!r} here; use device=cpu, or device=cuda with a GPU") from failure
    return device


def classifier(
    folder: Path, made: DictConfig, reader: "Reader", x: Tensor
) -> tuple[SmoothedClassifier, dict[str, Any], dict[str, Any]]:
    """The run's smoothed classifier on the device of a prepared input x, (c, h, w); its identity; and where it is not
    the run's, among what may differ, {name: [in the run, here]}.

    Raises:
        RequestError: it is not the run's, for its checkpoint, say.
    """
    smoothed, own = voting(made, trained_network(made, "predict"), reader.threat, x)
    identity = json.loads(json.dumps(own))
    check_identity(folder, identity, identity.keys() - set(MAY_DIFFER))
    smoothed.eval().check_function(x)
    then, now = (flat({key: of[key] for key in MAY_DIFFER}) for of in (read_identity(folder), identity))
    differs = {name: [then.get(name), now.get(name)] for name in then | now if then.get(name) != now.get(name)}
    return smoothed, identity, differs


def announce(folder: Path, differs: dict[str, Any]) -> None:
    """Says on stderr in what this is not the network as the run computed it."""
    if differs:
        changes = ", ".join(f"{name} {here} instead of {there}" for name, (there, here) in differs.items())
        print(
            f"gsmooth predict: {changes}; the certificates in {folder} are of the network as computed there",
            file=sys.stderr,
        )


def flat(identity: dict[str, Any]) -> dict[str, Any]:
    """With each version by its own name."""
    return {key: value for key, value in identity.items() if key != "versions"} | identity["versions"]


# ---------------------------------------------------------------- files


class Reader:
    """Files as inputs of the run: decoded, and brought to the data set's size, as its data set does it.

    ImageFolder, ImageNet, GTSRB and KITTI resize, and Speech Commands pads or cuts to a second. The others have images
    of one size, and a file of another one is refused; where the threat enlarges images first, one that is smaller is
    enlarged. Images are read as colour, as by torchvision's loader; a classifier of grey images takes those whose
    colours are all grey.

    Args:
        made: the run's configuration.
        device: of the inputs.

    Attributes:
        threat: the run's.
        shape: of a prepared input; None where images keep the size of their files.
        endings: of the files that a folder is searched for.
        names: of the classes, if the data set knows them.
    """

    def __init__(self, made: DictConfig, device: torch.device):
        self.threat: Threat = instantiate(made.threat)
        dataset: ImageData = instantiate(made.data.dataset)
        self.device, self.channels = device, made.data.channels
        names = dataset.names
        self.names = names if names is not None and len(names) == made.data.classes else None
        self.sound = isinstance(dataset, SpeechCommands)
        self.endings = (".wav",) if self.sound else IMG_EXTENSIONS
        self.resize = dataset.shape
        size = getattr(dataset, "size", plain(made.data.size))
        self.shape: tuple[int, ...] | None = None
        if size is not None:
            sides = size if isinstance(size, list) else [size] * (1 if self.sound else 2)
            self.shape = tuple(self.prepare(torch.zeros(self.channels, *sides)).shape)

    def prepare(self, x: Tensor) -> Tensor:
        return self.threat.prepare(x[None].to(self.device))[0]

    def example(self, paths: Sequence[Path] = ()) -> Tensor:
        """A prepared input like those of the run; where their size is that of the files, the first that can be read."""
        if self.shape is not None:
            return self.prepare(torch.zeros(self.shape))
        failures = []
        for path in paths:
            try:
                return self.read(path)
            except RequestError as failure:
                failures.append(failure)
        raise failures[0]

    def read(self, path: Path) -> Tensor:
        """The file as a prepared input, (c, h, w) or (c, t).

        Raises:
            RequestError: it cannot be read, or is no input of this classifier.
        """
        decode = read_second if self.sound else read_image
        try:
            x = Files([(path.name, 0)], path.parent, 1, decode, self.resize or nn.Identity())[0][0]
        except RequestError as failure:  # its remedy is for data sets
            raise RequestError(f"{str(failure).rpartition('; ')[0]}; repair the file, or leave it out") from failure
        if not self.sound and self.channels == 1:
            if bool((x != x[:1]).any()):
                raise RequestError(f"{path} has colours, and this classifier is of grey images; convert the file")
            x = x[:1]
        if self.resize is None and self.threat.size is not None and min(x.shape[1:]) > self.threat.size:
            raise RequestError(
                f"{path} is of {x.shape[1]}x{x.shape[2]} pixels, and images are enlarged to {self.threat.size}, not "
                "reduced; resize the file"
            )
        prepared = self.prepare(x)
        if self.shape is not None and prepared.shape != self.shape:
            raise RequestError(
                f"{path} makes an input of {by(prepared.shape)}, and this classifier is for {by(self.shape)}; resize "
                "the file"
            )
        return prepared


def by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def listed(files: Any, endings: tuple[str, ...]) -> list[Path]:
    """The files that a path or a list of paths names: of a folder all with these endings, sorted.

    Raises:
        RequestError: there are none.
    """
    named = plain(files) if OmegaConf.is_config(files) else [files]
    found: list[Path] = []
    for path in (Path(str(name)) for name in named):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
        if path.is_dir() and not inside:
            raise RequestError(f"{path} holds no files that end in {', '.join(endings)}; correct files=...")
        if not path.exists():
            raise RequestError(f"there is no file or folder {path}; correct files=...")
        found += inside if path.is_dir() else [path]
    if not found:
        raise RequestError("files=[] names nothing; give a file, a folder or a list of them")
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------- predictions


def predictions(
    predictor: Predictor, reader: Reader, paths: Sequence[Path], seed: int, in_flight: int
) -> Iterator[tuple[Path, Prediction | str, float]]:
    """(path, prediction or what is wrong with the file, seconds), in order."""
    smoothed, runs = predictor.smoothed, {reader.shape}

    def attempt(path: Path) -> Generator[Any, Any, Prediction | str]:
        try:
            x = reader.read(path)
            if x.shape not in runs:
                with torch.inference_mode():
                    check_runs(smoothed.base, torch.rand(smoothed.block, *smoothed.encoded_shape(x), device=x.device))
                runs.add(x.shape)
            return (yield from predictor.procedure(x, predictor.stream(x, seed)))
        except RequestError as failure:
            return str(failure) if str(path) in str(failure) else f"{path}: {failure}"

    found: dict[int, tuple[Prediction | str, float]] = {}
    turn = 0
    for place, result, seconds in run_rounds(enumerate(map(attempt, paths)), reader.device, in_flight):
        found[place] = result, seconds
        while turn in found:
            yield paths[turn], *found.pop(turn)
            turn += 1


def record(found: Prediction, names: Sequence[str] | None, seconds: float) -> Record:
    """The fields of a line, in the order in which they are read."""
    fields = asdict(found)
    name = None if names is None or found.prediction == ABSTAIN else names[found.prediction]
    return {"prediction": fields.pop("prediction"), "class": name, **fields, "seconds": seconds}


@contextlib.contextmanager
def lines_to(out: Any) -> Iterator[Callable[[Record], None]]:
    """What writes JSON lines: to stdout, or to a file, which is there when all are written."""
    part = f"{out}.part"
    try:
        with contextlib.nullcontext(sys.stdout) if out is None else open(part, "w") as file:
            yield lambda line: print(json.dumps(line), file=file, flush=True)
        if out is not None:
            os.replace(part, str(out))
    except OSError as failure:
        what = "the lines" if out is None else out
        raise RequestError(f"cannot write {what} ({failure.strerror}); choose another out=FILE") from failure


# ---------------------------------------------------------------- the module


def export(folder: Path, cfg: DictConfig, made: DictConfig, reader: Reader) -> None:
    """Writes the classifier as a module, with its plain network.

    Raises:
        RequestError: images of many sizes, what torch.export does not take, or a file that cannot be written.
    """
    if reader.shape is None:
        raise RequestError(
            "images of this run keep the size of their files, and a module is for one size; use files=PATH"
        )
    made.backend = "plain"
    x = reader.example()
    smoothed, identity, differs = classifier(folder, made, reader, x)
    n = 1000 if cfg.n is None else cfg.n
    module = Exportable(smoothed, reader.threat, x, n, cfg.alpha)
    inputs, names = reader.threat.inputs, reader.names
    about = {"n": n, "alpha": cfg.alpha, "inputs": inputs, "names": names, "identity": identity}
    content = saved(module, x, json.dumps(about))
    try:
        with open(str(cfg.export), "xb") as file:
            file.write(content)
    except OSError as failure:
        raise RequestError(f"cannot write {cfg.export} ({failure.strerror}); choose another export=FILE") from failure
    announce(folder, differs)
    print(f"written: {cfg.export}, from {by(x.shape)} {inputs} to (class or -1, votes of {n} draws), on {x.device}")


def main() -> None:
    command("predict", predict)


if __name__ == "__main__":
    main()
