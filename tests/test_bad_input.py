"""What a user can put right ends in one sentence on stderr, another exit code than 0, and no file touched."""

import contextlib
import pickle
import resource
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conftest import QUIET, SMALL, one_sentence, records, run_main, run_task, script, shell, snapshot, timeless
from gsmooth_lightning.data import Digits, ImageData, TensorImages
from gsmooth_lightning.model import SmallCNN


class BrokenPixels(ImageData):
    """Digits whose third image holds one pixel of another value."""

    def __init__(self, value: float):
        self.value = float(value)

    def split(self, name, classes):
        whole = Digits().split(name, classes)
        images = whole.images.float() / 16
        images[2, 0, 4, 4] = self.value
        return TensorImages(images, whole.labels, classes, levels=1)


class Payload:
    """Unpickling it would leave a file behind."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def idx(shape: tuple[int, ...], length: int) -> bytes:
    """An idx file of bytes with this header and `length` bytes of data."""
    return struct.pack(">BBBB", 0, 0, 8, len(shape)) + b"".join(struct.pack(">I", n) for n in shape) + bytes(length)


@pytest.fixture(scope="module")
def files(checkpoint, certified, tmp_path_factory) -> dict[str, Path]:
    """The files that cases name in braces."""
    folder = tmp_path_factory.mktemp("files")
    made = {"checkpoint": checkpoint, "certified": certified}
    state = torch.load(checkpoint, weights_only=True)["state_dict"]

    def save(name: str, content: object) -> None:
        made[name] = folder / f"{name}.ckpt"
        torch.save(content, made[name])

    save("wide", SmallCNN(widths=(16, 64)).state_dict())
    save("untrained", SmallCNN().state_dict())
    save("deep", SmallCNN(widths=(16, 32, 32)).state_dict())
    save("nan", {"state_dict": {k: v * float("nan") if v.is_floating_point() else v for k, v in state.items()}})
    save("pickled", {"state_dict": state, "hook": Payload()})
    save("empty_state", {"state_dict": {}})
    made["rawpickle"] = folder / "raw.pkl"
    made["rawpickle"].write_bytes(pickle.dumps(Payload()))
    made["text"] = folder / "text.ckpt"
    made["text"].write_text("these are no weights\n")
    made["cut"] = folder / "cut.ckpt"
    made["cut"].write_bytes(checkpoint.read_bytes()[:5000])
    for name, images in (("mnist", 28 * 28), ("halfmnist", 20 * 28)):  # the second is truncated
        made[name] = folder / name
        raw = made[name] / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for part, count in (("train", 6), ("t10k", 3)):
            (raw / f"{part}-images-idx3-ubyte").write_bytes(idx((count, 28, 28), count * images))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx((count,), count))
    run_task("bound", *SMALL, f"checkpoint={checkpoint}", f"store={folder / 'bounds'}", "images.first=2")
    made["bounds"] = folder / "bounds"
    made["stranger"] = folder / "stranger"  # an attack on another network
    run_task("attack", *SMALL, f"checkpoint={made['untrained']}", f"store={made['stranger']}", "images.first=2")
    return made


@dataclass(frozen=True)
class Case:
    """A command line that cannot be met.

    Attributes:
        command, overrides: after the usual small ones; {names} stand for prepared files.
        words: what the sentence must contain.
        prepare: what lies in the working folder: file name -> content, or a name in braces to copy.
        may_write: files that may appear all the same (their names), because the mistake shows only during the run.
    """

    command: str
    overrides: tuple[str, ...]
    words: tuple[str, ...]
    prepare: tuple[tuple[str, str], ...] = ()
    may_write: tuple[str, ...] = ()


def trained(*overrides: str, without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The usual overrides with a checkpoint, without those of the groups named."""
    kept = (o for o in SMALL if not o.startswith(tuple(f"{group}." for group in without) or "-"))
    return (*kept, "checkpoint={checkpoint}", *overrides)


def certify(*overrides: str, words: tuple[str, ...], without: tuple[str, ...] = (), **options) -> Case:
    return Case("certify", trained(*overrides, without=without), words, **options)


L2 = ("threat=l2", "transform=identity", "law=none", "error=none", "certify=direct")
PIXEL = ("threat", "law", "error")
SEQUENTIAL = ("sampling=sequential", "sampling.n=300")
STARTED = ("run", "run/config.yaml", "run/fingerprint.json", "run/rank-0.beat")


def pixels(value: str) -> Case:
    """A data set with a broken image, which shows when it is visited: an empty store may be there then."""
    broken = ("data.dataset._target_=test_bad_input.BrokenPixels", f"+data.dataset.value={value}")
    return certify(*broken, "store=run", words=("between 0 and 1",), may_write=STARTED)


CASES = {
    # words on the command line
    "unknown key": certify("foo=1", words=("'foo'",)),
    "unknown key in a group": certify("sampling.foo=1", words=("sampling.foo",)),
    "unknown option": certify("data=nosuch", words=("data/nosuch", "digits", "mnist")),
    "unbalanced bracket": certify("images.indices=[1", words=("[1",)),
    "no option at all": certify("law=null", words=("law",), without=("law",)),
    "group taken away": certify("~noise", words=("noise",), without=("noise",)),
    "unknown constructor keyword": certify("+sampling.foo=1", words=("foo", "FixedN")),
    "unknown keyword of images": certify("+images.foo=1", words=("foo", "images")),
    "unknown keyword of the trainer": certify("+trainer.foo=1", words=("foo", "trainer")),
    "unknown keyword of the optimizer": Case("train", (*QUIET, "+train.optimizer.foo=1"), ("foo", "optimizer")),
    "unknown target": certify("model._target_=nosuch.Class", words=("nosuch.Class", "model")),
    "unknown interpolated key": certify("sampling.n=${foo}", words=("foo", "sampling.n")),
    # types and ranges
    "block no number": certify("block=abc", words=("block", "abc")),
    "block too small": certify("block=1", words=("block", "at least 2")),
    "seed negative": certify("seed=-1", words=("seed", "-1")),
    "seed no number": certify("seed=abc", words=("seed", "abc")),
    "train seed negative": Case("train", (*QUIET, "seed=-1", "store=run"), ("seed", "-1")),
    "n zero": certify("sampling.n=0", words=("sampling.n", "0")),
    "n0 zero": certify("sampling.n0=0", words=("sampling.n0", "0")),
    "n too small for alpha": certify("sampling.n=5", words=("n=5", "alpha=0.001", "n=11")),
    "n not whole": certify("sampling.n=10.5", words=("sampling.n", "whole", "10.5")),
    "n no number": certify("sampling.n=many", words=("sampling.n", "many")),
    "alpha zero": certify("sampling.alpha=0", words=("alpha", "got 0")),
    "alpha above one": certify("sampling.alpha=1.5", words=("alpha", "1.5")),
    "alpha no number": certify("sampling.alpha=abc", words=("alpha", "abc")),
    "radii not increasing": certify(*SEQUENTIAL, "sampling.radii=[20,10]", words=("radii", "increasing", "20, 10")),
    "radii no list": certify(*SEQUENTIAL, "sampling.radii=3", words=("radii",)),
    "radius out of reach": certify(
        *SEQUENTIAL, "threat.low=-90", "threat.high=90", "sampling.radii=[5,60]",
        words=("60", "out of reach", "sampling.n"),
    ),
    "radius beyond the range": certify(*SEQUENTIAL, "sampling.radii=[5,60]", words=("60", "range of 10 degrees")),
    "sigma negative": certify("noise.sigma=-0.5", words=("sigma", "-0.5")),
    "sigma not finite": certify("noise.sigma=nan", words=("sigma", "nan")),
    "sigma no number": certify("noise.sigma=abc", words=("sigma", "abc")),
    "law sigma zero": certify("law.sigma=0", words=("sigma", "positive")),
    "bandwidth negative": certify("preprocess.steps.1.bandwidth=-1", words=("bandwidth", "-1")),
    "error draws zero": certify("error.draws=0", words=("error.draws", "0")),
    "error alpha zero": certify("error.alpha=0", "store=run", words=("alpha", "got 0")),
    "error quantile": certify("error.quantile=2", words=("error.quantile", "2")),
    "too few calibration images": certify(
        "error=distribution", "error.calibration=2", "store=run", without=("error",),
        words=("calibration", "at least 4", "2"),
    ),
    "bounds of sampling": certify("sampling.bounds=three", words=("sampling.bounds", "three")),
    "interpolation": certify("transform.interpolation=foo", words=("interpolation", "bilinear", "foo")),
    "backend": certify("backend=nosuch", words=("backend", "plain", "nosuch")),
    "saved format": certify("threat.saved=jpeg", words=("threat.saved", "8bit", "jpeg")),
    "threat low positive": certify("threat.low=5", words=("range", "0", "5 to 10")),
    "threat step negative": certify("threat.step=-1", words=("threat.step", "-1")),
    "epochs zero": Case("train", (*QUIET, "train.epochs=0"), ("train.epochs", "0")),
    "epochs no number": Case("train", (*QUIET, "train.epochs=abc"), ("train.epochs", "abc")),
    "batch size zero": Case("train", (*QUIET, "train.batch_size=0"), ("batch_size", "0")),
    "learning rate negative": Case("train", (*QUIET, "train.optimizer.lr=-1", "store=run"), ("-1",)),
    "attack k": Case("attack", trained("attack.k=1", "store=run"), ("attack.k", "got 1")),
    "accelerator missing": certify("trainer.accelerator=nosuch", words=("nosuch",)),
    # which images
    "indices out of range": certify("images.first=null", "images.indices=[3,400]", words=("399", "[400]")),
    "indices no numbers": certify("images.indices=abc", words=("images.indices", "abc")),
    "every zero": certify("images.every=0", words=("images.every", "got 0")),
    "first zero": certify("images.first=0", words=("images.first", "got 0")),
    "in flight zero": certify("images.in_flight=0", words=("in_flight", "0")),
    "split": certify("images.split=foo", words=("images.split", "val", "foo")),
    # data
    "folder of MNIST missing": certify("data=mnist", words=("data/MNIST/raw", "data.dataset.root")),
    "idx file truncated": certify("data=mnist", "data.dataset.root={halfmnist}", words=("MNIST/raw", "damaged")),
    "labels out of range": Case("train", (*QUIET, "data.classes=5", "store=run"), ("0 to 9", "data.classes=5")),
    "pixels NaN": pixels("nan"),
    "pixels infinite": pixels("inf"),
    "pixels out of range": pixels("2"),
    # checkpoints
    "no checkpoint": Case("certify", SMALL, ("checkpoint=", "gsmooth train")),
    "no checkpoint to attack": Case("attack", SMALL, ("checkpoint=", "gsmooth train")),
    "checkpoint missing": certify("checkpoint=nosuch.ckpt", words=("no checkpoint at nosuch.ckpt",)),
    "checkpoint is text": certify("checkpoint={text}", words=("text.ckpt", "not a checkpoint")),
    "checkpoint is cut": certify("checkpoint={cut}", words=("cut.ckpt", "not a checkpoint")),
    "checkpoint is a folder": certify("checkpoint={mnist}", words=("no checkpoint at",)),
    "checkpoint of other widths": certify("checkpoint={wide}", words=("does not fit", "features.4.weight")),
    "checkpoint of other depth": certify("checkpoint={deep}", words=("does not fit", "unknown", "features.8.weight")),
    "checkpoint with NaN": certify("checkpoint={nan}", words=("NaN", "features.0.weight")),
    "checkpoint with a pickled object": certify("checkpoint={pickled}", words=("pickled.ckpt", "weights_only")),
    "checkpoint is a pickle": certify("checkpoint={rawpickle}", words=("raw.pkl", "weights_only")),
    "checkpoint without weights": certify("checkpoint={empty_state}", words=("no state dict",)),
    # theorems
    "law without transformation": certify(*L2, "law=gaussian", words=("identity", "law"), without=PIXEL),
    "transformation without law": certify("law=none", words=("rotation", "law"), without=("law",)),
    "direct with rotation": certify("certify=direct", words=("rotation", "not exact", "certify=joint")),
    "joint without error bound": certify("error=none", words=("error=",), without=("error",)),
    "joint with pixel threat": certify(
        *L2, "certify=joint", "error=image", words=("certify=direct",), without=PIXEL
    ),
    "nothing to bound": Case("bound", trained("error=none", without=("error",)), ("error=none", "error=image")),
    "attack on pixels": Case("attack", trained(*L2, without=PIXEL), ("threat=rotation",)),
    "threat by nothing": certify("transform=identity", words=("identity", "with a parameter")),
    # stores
    "store of another run": certify(
        "store={certified}", "sampling.n=192", words=("another run", "sampling", "store=")
    ),
    "store of another command": Case("attack", trained("store={certified}"), ("another run", "command")),
    "store with other files": certify(
        "store=mine", words=("mine", "store="), prepare=(("mine/letter.txt", "dear"),)
    ),
    "store is the working folder": certify("store=.", words=("store=",), prepare=(("letter.txt", "dear"),)),
    "store below a file": certify("store=letter.txt/run", words=("letter.txt/run",), prepare=(("letter.txt", "x"),)),
    "store is a file": certify("store=letter.txt", words=("letter.txt", "store="), prepare=(("letter.txt", "x"),)),
    "training below a file": Case(
        "train", (*QUIET, "store=letter.txt/run"), ("letter.txt/run",), prepare=(("letter.txt", "x"),)
    ),
    "damaged fingerprint": certify(
        "store=mine", words=("mine", "fingerprint.json"), prepare=(("mine/fingerprint.json", "{"),)
    ),
    "damaged line": certify(
        "store=mine",
        words=("mine/rank-0.jsonl", "line 2", "damaged"),
        prepare=(
            ("mine/fingerprint.json", "{certified}/fingerprint.json"),
            ("mine/rank-0.jsonl", '{"index": 0}\n{"ind\n{"index": 2}\n'),
        ),
    ),
    "bounds missing": certify("bounds=nosuch", words=("nosuch", "not a store")),
    "bounds of another seed": certify("bounds={bounds}", "seed=3", words=("another run", "seed")),
    "bounds of other images": certify("bounds={bounds}", "images.split=val", words=("another run", "images")),
    "bounds of fewer images": certify(
        "bounds={bounds}", "images.first=3", "store=run", words=("bounds", "image 2", "gsmooth bound"),
        may_write=STARTED,
    ),
    "bounds that are certificates": certify("bounds={certified}", words=("certify", "gsmooth bound")),
    # reports
    "report of nothing": Case("report", (), ("stores",)),
    "report of no stores": Case("report", ("stores=[]",), ("stores",)),
    "report of no folder": Case("report", ("stores=nosuch",), ("nosuch", "not a store")),
    "report of another folder": Case("report", ("stores=mine",), ("mine",), prepare=(("mine/letter.txt", "dear"),)),
    "report of an empty store": Case(
        "report", ("stores=mine",), ("mine", "no finished image"),
        prepare=(("mine/fingerprint.json", "{certified}/fingerprint.json"),
                 ("mine/config.yaml", "{certified}/config.yaml")),
    ),
    "report of training": Case(
        "report", ("stores=mine",), ("mine", "train"),
        prepare=(("mine/fingerprint.json", '{"command": "train"}'), ("mine/config.yaml", "{certified}/config.yaml")),
    ),
    "report of a damaged store": Case(
        "report", ("stores=[mine]",), ("mine/records.jsonl", "line 3", "damaged"),
        prepare=(("mine/fingerprint.json", "{certified}/fingerprint.json"),
                 ("mine/config.yaml", "{certified}/config.yaml"),
                 ("mine/records.jsonl", '{"index": 0}\n{"index": 1}\n{"index\n{"index": 3}\n')),
    ),
    "report of certificates and an attack on another classifier": Case(
        "report", ("stores=[{certified},{stranger}]", "out=mine"), ("stranger", "another run", "checkpoint")
    ),
    "report of a store named twice": Case("report", ("stores=[{certified},{certified}/]", "out=mine"), ("twice",)),
    "report of a file that is no log": Case(
        "report", ("stores=letter.txt",), ("letter.txt", "neither a store nor a log"), prepare=(("letter.txt", "dear"),)
    ),
    "envelope of one store": Case("report", ("stores={certified}", "envelope=true"), ("envelope", "several runs")),
    "envelope of bounds": Case("report", ("stores={bounds}", "envelope=true"), ("envelope", "several runs")),
    "envelope no truth value": Case("report", ("stores={certified}", "envelope=abc"), ("envelope", "true or false")),
    "log of degrees": Case(
        "report", ("stores={certified}", "out=mine", "cohen=log.tsv"), ("l2", "degrees", "leave cohen out")
    ),
    "log of no certificates": Case("report", ("stores={bounds}", "cohen=log.tsv"), ("cohen=FILE", "not of 0")),
    "report below a file": Case(
        "report", ("stores={certified}", "out=letter.txt/x"), ("letter.txt/x", "out="), prepare=(("letter.txt", "x"),)
    ),
    "report at radii that are none": Case("report", ("stores={certified}", "radii=abc"), ("radii",)),
    # several at once
    "devices in a multirun": Case(
        "certify", ("-m", *trained("trainer=ddp", "trainer.accelerator=cpu", "devices=2", "seed=0,1")),
        ("launcher=slurm", "devices=1"),
        may_write=("runs", "runs/sweep", "runs/sweep/multirun.yaml"),  # Hydra's own, before the first job
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_sentence(name, files, here):
    """Exit code, one sentence with the words that matter, and the working folder as it was."""
    case = CASES[name]
    for path, content in case.prepare:
        target = here / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith("{certified}"):
            content = Path(content.format(**files)).read_text()
        target.write_text(content)
    overrides = []
    for override in case.overrides:
        for key, path in files.items():
            override = override.replace(f"{{{key}}}", str(path))
        overrides.append(override)
    before = snapshot(here), snapshot(files["certified"]), snapshot(files["bounds"])
    ended = run_main(case.command, *overrides)
    after = snapshot(here), snapshot(files["certified"]), snapshot(files["bounds"])
    one_sentence(ended, *case.words)
    assert {k: v for k, v in after[0].items() if k not in case.may_write or k in before[0]} == before[0]
    assert after[1:] == before[1:]


def test_unknown_flag(here):
    """Flags are Hydra's: its parser answers, with its usage."""
    ended = run_main("certify", "--nosuch")
    assert ended.error is None
    assert ended.code == 2
    assert ended.lines[-1].endswith("unrecognized arguments: --nosuch")
    assert snapshot(here) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("certfy",), ("certfy",)),
        (("certify", "sampling.n=0", "checkpoint={checkpoint}"), ("gsmooth certify", "sampling.n", "0")),
        (("report", "stores=nosuch"), ("gsmooth report", "nosuch")),
    ],
)
def test_one_sentence_as_typed(arguments, words, files, here):
    """The same through the console script, warnings and all."""
    overrides = (a.replace("{checkpoint}", str(files["checkpoint"])) for a in arguments)
    small = SMALL if arguments[0] == "certify" else ()
    ended = shell(script("gsmooth"), arguments[0], *small, *list(overrides)[1:], cwd=here)
    one_sentence(ended, *words)
    assert ended.code == 2
    assert snapshot(here) == {}


@contextlib.contextmanager
def disk_full_after(size: int):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_full(files, here, certified):
    """A write that fails half-way ends in one sentence; what was finished is kept, and the same command goes on."""
    overrides = (*SMALL, f"checkpoint={files['checkpoint']}", "store=run")
    run_task("certify", *overrides, "images.first=2")
    line = len((certified / "records.jsonl").read_bytes().splitlines()[2])
    kept = records(here / "run")
    with disk_full_after(int(1.5 * line)):
        ended = run_main("certify", *overrides)
    one_sentence(ended, "cannot write to run", "free space", "finished images are kept")
    shard = (here / "run" / "rank-0.jsonl").read_bytes()
    assert shard.count(b"\n") == 1
    assert records(here / "run") == kept
    run_task("certify", *overrides)
    assert timeless(here / "run")["records.jsonl"] == timeless(certified)["records.jsonl"]
    assert shard.splitlines(keepends=True)[0] in (here / "run" / "records.jsonl").read_bytes()


def test_disk_full_from_the_start(files, here):
    """Not even the fingerprint fits."""
    with disk_full_after(100):
        ended = run_main("certify", *SMALL, f"checkpoint={files['checkpoint']}", "store=run")
    one_sentence(ended, "cannot write to run", "free space")
    run_task("certify", *SMALL, f"checkpoint={files['checkpoint']}", "store=run")
    assert len(records(here / "run")) == 6


def test_disk_full_while_training(here):
    """A checkpoint that does not fit is not left in place of a whole one."""
    with disk_full_after(20_000):
        ended = run_main("train", *QUIET, "train.epochs=1", "store=run")
    assert not (here / "run" / "classifier.ckpt").exists()
    one_sentence(ended, "run")
