"""Data sets that are missing, damaged or asked for what they have not: one sentence each."""

import io
import json
import multiprocessing
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

import layouts
from conftest import QUIET, SMALL, one_sentence, run_main, snapshot
from gsmooth_lightning.data import (
    CIFAR10,
    CIFAR10C,
    CIFAR100,
    GTSRB,
    ImageData,
    ImageFolder,
    ImageNet,
    Kitti,
    RestrictedImageNet,
    SpeechCommands,
)
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ImageDataModule

# --- mistakes


@dataclass(frozen=True)
class Mistake:
    """What lies in a folder, what is asked of it, and what the one sentence must contain.

    Attributes:
        ask: root -> data set, or an item of it (the whole test split is read).
        words: of the sentence; {root} is the folder.
        spoil: root, patches -> nothing: makes the folder.
        split, classes: of what is asked.
    """

    ask: Callable[[str], ImageData]
    words: tuple[str, ...]
    spoil: Callable[[Path, pytest.MonkeyPatch], Any] = lambda root, patches: None
    split: str = "test"
    classes: int = 4


def spoiled(make: Callable[[Path], Path], name: str, spoil: Callable[[Path], Any]):
    """A layout with one file spoiled."""
    return lambda root, patches: spoil(make(root) / name)


def spoiled_cifar(name: str, spoil: Callable[[Path], Any]):
    return lambda root, patches: spoil(layouts.cifar(root, datasets.CIFAR10, patches, 5005) / name)


def tree(root: Path) -> Path:
    return layouts.folders(root, layouts.TREE)


def three_frames(root: Path) -> Path:
    return layouts.kitti(root, [("Car",), ("Van",), ("Car",)])


def two_words(root: Path) -> Path:
    folder = layouts.speech(root, {"yes": layouts.SPEAKERS, "no": layouts.SPEAKERS})
    assert (folder / TESTED).exists()
    return folder


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def huge(path: Path) -> None:
    """A picture whose header claims 60,000 x 60,000 pixels."""
    stream = io.BytesIO()
    Image.fromarray(layouts.pixels(0)).save(stream, "BMP")
    head = bytearray(stream.getvalue())
    head[18:26] = struct.pack("<ii", 60_000, 60_000)
    path.write_bytes(bytes(head))


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(path)


def sixteen_bits_in_colour(path: Path) -> None:
    """A PNG of 8 x 8 pixels, three numbers of 16 bits each, which PIL opens as RGB."""
    head, rows = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0), zlib.compress(bytes(8 * 49))
    parts = (b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")
    chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def rate(hz: int, channels: int = 1) -> Callable[[Path], Any]:
    return lambda path: layouts.clip(path, np.stack([layouts.samples(0, 500)] * channels, axis=1), hz)


def fog(root: str, severity: int = 1) -> ImageData:
    return CIFAR10C(root, "fog", severity)


TESTED = "yes/00000001_nohash_0.wav"
"""A clip of a speaker in the test split (asserted where it is used)."""

FOLDER_FIX = ("set data.dataset.root",)
RESTORE = ("restore it, or unpack the data set again",)
CIFAR_FIX = ("{root}/cifar-10-batches-py", "unpack", "data.dataset.root", "data.dataset.download=true")
LABEL_FILE = ("{root}/Kitti/raw/training", "000001.txt")

MISTAKES = {
    # no such folder
    "cifar10 missing": Mistake(CIFAR10, CIFAR_FIX),
    "cifar100 missing": Mistake(CIFAR100, ("{root}/cifar-100-python", "data.dataset.root")),
    "cifar10-c missing": Mistake(fog, ("{root}/CIFAR-10-C/", ".npy is missing", "data.dataset.root")),
    "folder missing": Mistake(lambda r: ImageFolder(r + "/no", 8), ("{root}/no is not a folder", *FOLDER_FIX)),
    "folder with validation images only": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test is not a folder with one folder of images", *FOLDER_FIX),
        lambda r, _: layouts.folders(r, {"val": {"cat": 2}}),
    ),
    "folder without training images": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/train is missing", "put training images there"),
        lambda r, _: layouts.folders(r, layouts.TEST_IMAGES), "train",
    ),
    "imagenet missing": Mistake(lambda r: ImageNet(r + "/no"), ("{root}/no is not a folder", *FOLDER_FIX)),
    "gtsrb missing": Mistake(GTSRB, ("{root}/gtsrb does not hold", "set data.dataset.root")),
    "kitti missing": Mistake(Kitti, ("{root}/Kitti/raw/training does not hold", "set data.dataset.root")),
    "speech missing": Mistake(SpeechCommands, ("{root}/SpeechCommands/speech_commands_v0.02 is missing", *FOLDER_FIX)),
    "speech of another version": Mistake(
        lambda r: SpeechCommands(r, version="v0.01"), ("speech_commands_v0.01 is missing",), lambda r, _: two_words(r)
    ),
    # CIFAR
    "cifar10 batch cut": Mistake(CIFAR10, (*CIFAR_FIX, "damaged"), spoiled_cifar("test_batch", layouts.cut)),
    "cifar10 batch gone": Mistake(CIFAR10, CIFAR_FIX, spoiled_cifar("data_batch_3", Path.unlink)),
    "cifar10 batch changed": Mistake(CIFAR10, (*CIFAR_FIX, "damaged"), spoiled_cifar("data_batch_3", text("x"))),
    "cifar10 names changed": Mistake(CIFAR10, (*CIFAR_FIX, "damaged"), spoiled_cifar("batches.meta", text("x"))),
    "cifar10-c to train on": Mistake(
        fog, ("test split only", "data=cifar10", "images.split=test"), lambda r, _: layouts.cifar_c(r), "train"
    ),
    "corruption unknown": Mistake(
        lambda r: CIFAR10C(r, "smog", 1),
        ("{root}/CIFAR-10-C/smog.npy is missing", "data.dataset.corruption from fog, gaussian_blur"),
        lambda r, _: layouts.cifar_c(r),
    ),
    "severity 0": Mistake(lambda r: fog(r, 0), ("data.dataset.severity must be 1 to 5, got 0",)),
    "severity 6": Mistake(lambda r: fog(r, 6), ("data.dataset.severity must be 1 to 5, got 6",)),
    "severity a fraction": Mistake(
        lambda r: fog(r, 2.0), ("data.dataset.severity must be 1 to 5, got 2.0",), lambda r, _: layouts.cifar_c(r)
    ),
    "corruption cut": Mistake(
        fog, ("{root}/CIFAR-10-C/fog.npy is damaged", "again"), spoiled(layouts.cifar_c, "fog.npy", layouts.cut)
    ),
    "corruption empty": Mistake(
        fog, ("{root}/CIFAR-10-C/fog.npy is damaged", "again"), spoiled(layouts.cifar_c, "fog.npy", empty)
    ),
    "corruption of another shape": Mistake(
        fog, ("{root}/CIFAR-10-C/fog.npy is damaged", "again"),
        spoiled(layouts.cifar_c, "fog.npy", lambda path: np.save(path, np.zeros((20, 32, 32), np.uint8))),
    ),
    "corruption of floats": Mistake(
        fog, ("{root}/CIFAR-10-C/fog.npy is damaged", "again"),
        spoiled(layouts.cifar_c, "fog.npy", lambda path: np.save(path, np.ones((20, 32, 32, 3), np.float32))),
    ),
    "corruption labels": Mistake(
        lambda r: CIFAR10C(r, "labels", 1), ("{root}/CIFAR-10-C", "labels"), lambda r, _: layouts.cifar_c(r)
    ),
    "corruption with fewer images than labels": Mistake(
        fog, ("{root}/CIFAR-10-C/fog.npy is damaged", "19 images, 20 labels"),
        spoiled(layouts.cifar_c, "fog.npy", lambda path: np.save(path, np.zeros((19, 32, 32, 3), np.uint8))),
    ),
    "labels of corruptions missing": Mistake(
        fog, ("{root}/CIFAR-10-C/labels.npy is missing",), spoiled(layouts.cifar_c, "labels.npy", Path.unlink)
    ),
    "labels of corruptions cut": Mistake(
        fog, ("{root}/CIFAR-10-C", "labels.npy", "damaged"), spoiled(layouts.cifar_c, "labels.npy", layouts.cut)
    ),
    "labels of corruptions empty": Mistake(
        fog, ("{root}/CIFAR-10-C", "labels.npy", "damaged"), spoiled(layouts.cifar_c, "labels.npy", empty)
    ),
    # pictures in folders
    "picture cut": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png cannot be read", *RESTORE),
        spoiled(tree, "test/dog/1.png", layouts.cut),
    ),
    "picture empty": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png cannot be read", *RESTORE),
        spoiled(tree, "test/dog/1.png", empty),
    ),
    "picture that is text": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png cannot be read", *RESTORE),
        spoiled(tree, "test/dog/1.png", text("dear")),
    ),
    "picture with a huge size in its header": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png cannot be read", *RESTORE),
        spoiled(tree, "test/dog/1.png", huge),
    ),
    "picture of 16 bits": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png cannot be read (its pixels have more than 8 bits",),
        spoiled(tree, "test/dog/1.png", sixteen_bits),
    ),
    "picture of 16 bits in colour": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png cannot be read (its pixels have more than 8 bits",),
        spoiled(tree, "test/dog/1.png", sixteen_bits_in_colour),
    ),
    "class without pictures": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test is not a folder", "emu", *FOLDER_FIX),
        spoiled(tree, "test/emu", Path.mkdir),
    ),
    "more classes than data.classes": Mistake(
        lambda r: ImageFolder(r, 8), ("labels run from 0 to 1", "data.classes=1 allows 0 to 0"),
        lambda r, _: tree(r), classes=1,
    ),
    "test class that training lacks": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test", "emu"),
        spoiled(tree, "test/emu/0.png", layouts.picture),
    ),
    "resize below the crop": Mistake(
        lambda r: ImageFolder(r, 8, resize=7), ("data.dataset.resize=7", "data.size=8"), lambda r, _: tree(r)
    ),
    "resize of imagenet below the crop": Mistake(lambda r: ImageNet(r, 300), ("resize=256", "data.size=300")),
    "size zero": Mistake(lambda r: ImageFolder(r, 0), ("data.size", "0"), lambda r, _: tree(r)),
    "validation zero": Mistake(
        lambda r: ImageFolder(r, 8, validation=0), ("data.dataset.validation", "0"), lambda r, _: tree(r), "train"
    ),
    "foreign class in imagenet": Mistake(
        ImageNet, ("'cat'", "no class of ImageNet", "n01440764", "data=folder"),
        lambda r, _: layouts.folders(r, {"val": {"cat": 1, "n01440764": 1}}),
    ),
    "foreign class in restricted imagenet": Mistake(
        RestrictedImageNet, ("'n00000001'", "no class of ImageNet"),
        lambda r, _: layouts.folders(r, {"val": {"n00000001": 1}}),
    ),
    "nothing of the super-classes": Mistake(
        RestrictedImageNet, ("{root}/val holds no files", *(w.removeprefix("set ") for w in FOLDER_FIX)),
        lambda r, _: layouts.folders(r, {"val": {"n01440764": 1}}),
    ),
    # GTSRB
    "sign cut": Mistake(
        GTSRB, ("{root}/gtsrb/GTSRB/Final_Test/Images/00002.ppm cannot be read", *RESTORE),
        spoiled(layouts.gtsrb, "GTSRB/Final_Test/Images/00002.ppm", layouts.cut),
    ),
    "sign gone": Mistake(
        GTSRB, ("{root}/gtsrb/GTSRB/Final_Test/Images/00002.ppm is missing", *RESTORE),
        spoiled(layouts.gtsrb, "GTSRB/Final_Test/Images/00002.ppm", Path.unlink),
    ),
    "signs without a track": Mistake(
        GTSRB, ("GTSRB/Training/00001/sign.ppm is not named TRACK_FRAME", "as published"),
        spoiled(layouts.gtsrb, "GTSRB/Training/00001/sign.ppm", layouts.picture), "train",
    ),
    "signs of a track without a number": Mistake(
        GTSRB, ("GTSRB/Training/00001/a_b.ppm is not named TRACK_FRAME", "as published"),
        spoiled(layouts.gtsrb, "GTSRB/Training/00001/a_b.ppm", layouts.picture), "train",
    ),
    "signs without the csv": Mistake(
        GTSRB, ("{root}/gtsrb", "GT-final_test.csv", "unpack"), spoiled(layouts.gtsrb, "GT-final_test.csv", Path.unlink)
    ),
    "csv with a word for a class": Mistake(
        GTSRB, ("{root}/gtsrb", "GT-final_test.csv", "'stop'"),
        spoiled(layouts.gtsrb, "GT-final_test.csv", text("Filename;ClassId\n00000.ppm;stop\n")),
    ),
    "csv cut in a row": Mistake(
        GTSRB, ("{root}/gtsrb", "GT-final_test.csv"),
        spoiled(layouts.gtsrb, "GT-final_test.csv", text("Filename;ClassId\n00000.ppm")),
    ),
    "csv with another separator": Mistake(
        GTSRB, ("{root}/gtsrb", "GT-final_test.csv"),
        spoiled(layouts.gtsrb, "GT-final_test.csv", text("Filename,ClassId\n00000.ppm,1\n")),
    ),
    "csv with a class beyond data.classes": Mistake(
        GTSRB, ("labels run from 0 to 2", "data.classes=2"), lambda r, _: layouts.gtsrb(r), classes=2
    ),
    # KITTI
    "object of unknown kind": Mistake(
        lambda r: Kitti(r, fold=1), (*LABEL_FILE, "'Ufo'"),
        spoiled(three_frames, "label_2/000001.txt", text(f"Ufo {layouts.FIELDS}\n")),
    ),
    "label file cut": Mistake(
        lambda r: Kitti(r, fold=1), LABEL_FILE, spoiled(three_frames, "label_2/000001.txt", layouts.cut)
    ),
    "label file with a blank line": Mistake(
        lambda r: Kitti(r, fold=1), LABEL_FILE, spoiled(three_frames, "label_2/000001.txt", text("\n"))
    ),
    "label file of bytes": Mistake(
        lambda r: Kitti(r, fold=1), LABEL_FILE,
        spoiled(three_frames, "label_2/000001.txt", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    ),
    "label file gone": Mistake(
        lambda r: Kitti(r, fold=1), LABEL_FILE, spoiled(three_frames, "label_2/000001.txt", Path.unlink)
    ),
    "frame cut": Mistake(
        lambda r: Kitti(r, fold=1), ("{root}/Kitti/raw/training/image_2/000001.png cannot be read", *RESTORE),
        spoiled(three_frames, "image_2/000001.png", layouts.cut),
    ),
    "fold of none": Mistake(lambda r: Kitti(r, fold=0), ("data.dataset.fold must be at least 1, got 0",)),
    "training on one fold": Mistake(
        lambda r: Kitti(r, fold=1), ("{root}/Kitti/raw/training holds no files for this split",),
        lambda r, _: three_frames(r), "train",
    ),
    # Speech Commands
    "word that nobody says": Mistake(
        lambda r: SpeechCommands(r, ["yes", "perhaps"]),
        ("{root}/SpeechCommands/speech_commands_v0.02 holds no clips of 'perhaps'", "correct data.dataset.words"),
        lambda r, _: two_words(r),
    ),
    "clip cut in the header": Mistake(
        SpeechCommands, (f"{TESTED} cannot be read", *RESTORE),
        spoiled(two_words, TESTED, lambda path: layouts.cut(path, 0.005)),
    ),
    "clip cut in the samples": Mistake(
        SpeechCommands, (f"{TESTED} cannot be read", *RESTORE), spoiled(two_words, TESTED, layouts.cut)
    ),
    "clip at 8 kHz": Mistake(
        SpeechCommands, (f"{TESTED} cannot be read", "8000 Hz", "16000 Hz"), spoiled(two_words, TESTED, rate(8000))
    ),
    "clip in stereo": Mistake(
        SpeechCommands, (f"{TESTED} cannot be read", "2 channels"), spoiled(two_words, TESTED, rate(16000, 2))
    ),
    "clip that is text": Mistake(
        SpeechCommands, (f"{TESTED} cannot be read",), spoiled(two_words, TESTED, text("yes"))
    ),
    "clip of another name": Mistake(
        SpeechCommands, ("{root}/SpeechCommands", "somebody_nohash_x.wav"),
        spoiled(two_words, "yes/somebody_nohash_x.wav", rate(16000)),
    ),
    "list with a foreign line": Mistake(
        SpeechCommands, ("{root}/SpeechCommands", "testing_list.txt"),
        spoiled(two_words, "testing_list.txt", text("nobody\n")),
    ),
    "clip listed but gone": Mistake(
        SpeechCommands, ("yes/00000003_nohash_0.wav is missing", *RESTORE),
        lambda r, _: (
            layouts.speech(
                r, {"yes": layouts.SPEAKERS}, ["yes/00000002_nohash_0.wav"], ["yes/00000003_nohash_0.wav"]
            ) / "yes/00000003_nohash_0.wav"
        ).unlink(),
    ),
    "more words than data.classes": Mistake(
        SpeechCommands, ("labels run from 0 to 1", "data.classes=1"), lambda r, _: two_words(r), classes=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_path_and_the_fix(name, tmp_path, monkeypatch):
    case = MISTAKES[name]
    case.spoil(tmp_path, monkeypatch)

    def read() -> None:
        part = case.ask(str(tmp_path)).split(case.split, case.classes)
        for i in range(len(part)):
            part[i]

    with pytest.raises(RequestError) as caught:
        read()
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    for word in case.words:
        assert word.format(root=tmp_path) in sentence


def test_a_blank_line_in_an_official_list_changes_nothing(tmp_path):
    """Editors leave one at the end."""
    lists = {"validation": ["yes/00000002_nohash_0.wav"], "testing": ["yes/00000003_nohash_0.wav", ""]}
    layouts.speech(tmp_path, {"yes": layouts.SPEAKERS[:5]}, **lists)
    data = SpeechCommands(str(tmp_path))
    assert [len(data.split(name, 1)) for name in ("train", "val", "test")] == [3, 1, 1]


# --- mistakes on the command line


COMMANDS = {
    "cifar10 missing": (("data=cifar10",), ("data/cifar-10-batches-py", "data.dataset.root"), None),
    "cifar100 missing": (("data=cifar100",), ("data/cifar-100-python", "data.dataset.root"), None),
    "folder missing": (("data=folder", "data.size=8"), ("data/train is missing",), None),
    "imagenet missing": (("data=imagenet", "model.size=8"), ("data/train is missing",), None),
    "restricted imagenet missing": (("data=restricted_imagenet", "model.size=8"), ("data/train is missing",), None),
    "gtsrb missing": (("data=gtsrb",), ("data/gtsrb does not hold",), None),
    "kitti missing": (("data=kitti", "model.size=8"), ("data/Kitti/raw/training does not hold",), None),
    "speech missing": (("data=speech_commands_ten", "model.size=8"), ("speech_commands_v0.02 is missing",), None),
    "cifar10-c to train on": (("data=cifar10_c",), ("test split only", "data=cifar10"), None),
    "severity": (("data=cifar10_c", "data.dataset.severity=9"), ("data.dataset.severity", "9"), None),
    "resize below the crop": ((*layouts.OF_TREE, "data.dataset.resize=4"), ("resize=4", "data.size=8"), tree),
    "validation zero": ((*layouts.OF_TREE, "data.dataset.validation=0"), ("data.dataset.validation",), tree),
    "too few classes": (
        layouts.OF_TREE, ("labels run from 0 to 2", "data.classes=2"),
        lambda r: layouts.folders(r, {"train": dict.fromkeys("abc", 2)}),
    ),
    "foreign class": (
        ("data=imagenet", "data.size=8", "data.dataset.resize=8"), ("'cat'", "no class of ImageNet"), tree
    ),
    "kind of object": (
        ("data=kitti", "model.size=8"), ("000001.txt", "'Ufo'"), lambda r: layouts.kitti(r, [("Car",), ("Ufo",)])
    ),
    "word": (
        ("data=speech_commands", "model.size=8", "data.dataset.words=[yes,perhaps]"), ("'perhaps'",), two_words
    ),
    "signs without a track": (
        ("data=gtsrb",), ("sign.ppm", "TRACK_FRAME"),
        lambda r: layouts.picture(layouts.gtsrb(r) / "GTSRB" / "Training" / "00001" / "sign.ppm"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_ends_a_command_in_one_sentence(name, here):
    """`gsmooth train`: status 2, and the working folder as it was."""
    overrides, words, make = COMMANDS[name]
    if make is not None:
        make(here / "data")
    before = snapshot(here)
    one_sentence(run_main("train", *QUIET, *overrides, "store=run"), *words)
    assert snapshot(here) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_met_while_training_is_one_sentence(here, workers):
    """Also when a loader's process meets it: no traceback."""
    layouts.cut(tree(here / "data") / "train" / "dog" / "3.png")
    ended = run_main("train", *QUIET, *layouts.OF_TREE, f"data.workers={workers}", "train.epochs=1", "store=run")
    one_sentence(ended, "data/train/dog/3.png cannot be read", *RESTORE)
    assert not (here / "run" / "classifier.ckpt").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_met_while_certifying_is_one_sentence(here, network, workers):
    """The first picture is certified and kept."""
    layouts.cut(tree(here / "data") / "test" / "dog" / "0.png")
    overrides = (*SMALL, *layouts.OF_TREE, f"data.workers={workers}", "images.in_flight=1")
    ended = run_main("certify", *overrides, f"checkpoint={network(*overrides)}", "store=run")
    one_sentence(ended, "data/test/dog/0.png cannot be read", *RESTORE)
    assert [r["index"] for r in records_so_far(here / "run")] == [0, 1]


def test_a_picture_removed_during_a_run_is_a_request_error_that_leaves_no_process(here):
    """A loader's process cannot find a file that was there when the folder was listed; the others end at once.

    Processes left to the garbage collector hold the command up for seconds and print a traceback of their queues.
    """
    module = ImageDataModule(ImageFolder(str(tree(here / "data")), 8), 2, in_flight=1, workers=2)
    assert len(module.visited) == 4
    (here / "data" / "test" / "dog" / "1.png").unlink()
    with pytest.raises(RequestError, match=r"test/dog/1\.png is missing"):
        list(module.predict_dataloader())
    assert multiprocessing.active_children() == []


def records_so_far(folder: Path) -> list[dict]:
    """Finished lines of an unfinished store."""
    return [json.loads(line) for line in (folder / "rank-0.jsonl").read_text().splitlines()]
