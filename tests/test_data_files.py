"""Data sets on generated copies of their layouts: items, splits, mistakes, laziness, augmentation."""

import hashlib
import io
import json
import multiprocessing
import pickle
import shutil
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

import layouts
from conftest import QUIET, SMALL, compose, records, run_main, run_task, snapshot
from gsmooth_lightning.data import (
    CIFAR10,
    CIFAR10C,
    CIFAR100,
    GTSRB,
    Digits,
    ImageData,
    ImageFolder,
    ImageNet,
    Inputs,
    Kitti,
    RestrictedImageNet,
    SpeechCommands,
)
from gsmooth_lightning.data import folder as folder_module
from gsmooth_lightning.data.folder import RESTRICTED, imagenet_classes
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ImageDataModule
from gsmooth_lightning.threat import PixelThreat

TEST_IMAGES = {"test": {"cat": 2, "dog": 2}}
TREE = {"train": {"cat": 6, "dog": 5}, **TEST_IMAGES}
SPEAKERS = [f"{i:08x}" for i in range(20)]


def labels(data: Inputs) -> list[int]:
    return [int(data[i][1]) for i in range(len(data))]


def check_items(data: Inputs, shape: tuple[int, ...], steps: int = 255) -> None:
    """Shape, type, index and range of every item; values are whole steps."""
    low = -1 if steps == 32768 else 0
    for i in range(len(data)):
        x, label, index = data[i]
        assert (tuple(x.shape), x.dtype, index) == (shape, torch.float32, i)
        assert isinstance(label, int)
        assert low <= float(x.min()) <= float(x.max()) <= 1
        assert torch.equal(x, torch.round(x * steps) / steps)


def as_floats(bytes_: np.ndarray) -> Tensor:
    """(h, w, c) bytes -> (c, h, w), k/255 in single precision."""
    return torch.from_numpy((bytes_.astype(np.float32) / np.float32(255)).transpose(2, 0, 1))


# --- CIFAR-10, CIFAR-100 and CIFAR-10-C


@pytest.mark.parametrize(("data", "source", "classes"), [(CIFAR10, "CIFAR10", 10), (CIFAR100, "CIFAR100", 100)])
def test_cifar_batches(tmp_path, monkeypatch, data, source, classes):
    """Train and val are the training batches in order, cut before the last 5,000 images."""
    layouts.cifar(tmp_path, getattr(datasets, source), monkeypatch)
    parts = {name: data(str(tmp_path)).split(name, classes) for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 20, "val": 5000, "test": 12}
    check_items(parts["train"], (3, 32, 32))
    check_items(parts["test"], (3, 32, 32))
    everything = layouts.cifar_pixels(5032)
    for part, first in ((parts["train"], 0), (parts["val"], 20), (parts["test"], 5020)):
        assert torch.equal(part[7][0], as_floats(everything[first + 7].transpose(1, 2, 0)))
    assert labels(parts["train"]) == [i % classes for i in range(20)]
    assert labels(parts["val"])[:3] == [20 % classes, 21 % classes, 22 % classes]
    assert labels(parts["test"])[:3] == [classes - 1, classes - 2, classes - 3]
    assert source in data(str(tmp_path)).describe()
    assert "32x32; the last 5,000 images of the training batches validate" in data(str(tmp_path)).describe()
    with pytest.raises(RequestError, match=rf"0 to {classes - 1}, but data\.classes=7"):
        data(str(tmp_path)).split("train", 7)


def test_cifar_content_hash_covers_pixels_and_labels(tmp_path, monkeypatch):
    def test_hash(change: Callable[[dict], None], name: str) -> str:
        folder = layouts.cifar(tmp_path / name, datasets.CIFAR10, monkeypatch, 5010)
        content = pickle.loads((folder / "test_batch").read_bytes())
        change(content)
        (folder / "test_batch").write_bytes(pickle.dumps(content))
        md5 = hashlib.md5((folder / "test_batch").read_bytes()).hexdigest()
        monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5]])
        return CIFAR10(str(tmp_path / name)).split("test", 10).content_hash

    def pixel(content: dict) -> None:
        content["data"][3, 1000] ^= 1

    def label(content: dict) -> None:
        content["labels"][3] = 0

    same, again = test_hash(lambda content: None, "a"), test_hash(lambda content: None, "b")
    assert same == again
    assert len({same, test_hash(pixel, "c"), test_hash(label, "d")}) == 3


def test_cifar10_c_severities(tmp_path):
    layouts.cifar_c(tmp_path)
    for severity in range(1, 6):
        for c, corruption in enumerate(("fog", "gaussian_blur")):
            data = CIFAR10C(str(tmp_path), corruption, severity)
            part = data.split("test", 10)
            check_items(part, (3, 32, 32))
            assert labels(part) == [0, 1, 2, 3]
            assert torch.equal(part[1][0], torch.full((3, 32, 32), 10.0 * severity + c) / 255)
            assert f"corruption {corruption} at severity {severity}" in data.describe()
    fog = [CIFAR10C(str(tmp_path), "fog", s).split("test", 10).content_hash for s in (1, 1, 2)]
    assert fog[0] == fog[1] != fog[2]


# --- folders


def test_image_folder_splits(tmp_path):
    """Without a folder val, one training image in `validation` validates; the test folder is one of its own."""
    layouts.folders(tmp_path, TREE)
    data = ImageFolder(str(tmp_path), size=8, validation=4)
    parts = {name: data.split(name, 2) for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 8, "val": 3, "test": 4}
    assert sorted(parts["train"].files + parts["val"].files) == sorted(
        [(f"cat/{i}.png", 0) for i in range(6)] + [(f"dog/{i}.png", 1) for i in range(5)]
    )
    check_items(parts["test"], (3, 8, 8))
    assert labels(parts["test"]) == [0, 0, 1, 1]
    assert torch.equal(parts["test"][3][0], as_floats(layouts.pixels(14)))
    assert "8x8" in data.describe()
    assert "one training image in 4 validates" in data.describe()


def test_image_folder_with_a_validation_folder_and_with_test_images_only(tmp_path):
    layouts.folders(tmp_path / "three", {"train": {"a": 3, "b": 2}, "val": {"a": 1, "b": 2}, "test": {"a": 1, "b": 1}})
    data = ImageFolder(str(tmp_path / "three"), 8)
    assert [len(data.split(name, 2)) for name in ("train", "val", "test")] == [5, 3, 2]
    assert data.split("val", 2).root == tmp_path / "three" / "val"
    layouts.folders(tmp_path, {"bare": {"a": 2, "b": 3}})
    assert labels(ImageFolder(str(tmp_path / "bare"), 8).split("test", 2)) == [0, 0, 1, 1, 1]


def test_images_are_resized_at_the_shorter_side_and_cropped_at_the_centre(tmp_path):
    """Against PIL: 20x12 pixels, shorter side 6, centre 4x4."""
    layouts.picture(tmp_path / "test" / "a" / "0.png", 5, height=12, width=20)
    x = ImageFolder(str(tmp_path), size=4, resize=6).split("test", 1)[0][0]
    small = Image.fromarray(layouts.pixels(5, 12, 20)).resize((10, 6), Image.Resampling.BILINEAR).crop((3, 1, 7, 5))
    assert torch.equal(x, as_floats(np.asarray(small)))


def test_grey_images_and_palettes_are_read_as_colour(tmp_path):
    (tmp_path / "test" / "a").mkdir(parents=True)
    grey = Image.fromarray(layouts.pixels(1)[:, :, 0])
    grey.save(tmp_path / "test" / "a" / "0.png")
    grey.convert("P").save(tmp_path / "test" / "a" / "1.png")
    data = ImageFolder(str(tmp_path), 8).split("test", 1)
    assert torch.equal(data[0][0], as_floats(np.repeat(layouts.pixels(1)[:, :, :1], 3, axis=2)))
    assert torch.equal(data[1][0], data[0][0])


def test_a_class_keeps_its_label_where_a_split_lacks_another_class(tmp_path):
    """Train has cat, dog and emu; the test images lack cat: dog stays 1."""
    layouts.folders(tmp_path, {"train": {"cat": 2, "dog": 2, "emu": 2}, "test": {"dog": 1, "emu": 1}})
    assert labels(ImageFolder(str(tmp_path), 8).split("test", 3)) == [1, 2]


def test_imagenet_labels_are_those_of_the_thousand_classes(tmp_path):
    """n01440764 is tench, 0; n01443537 goldfish, 1; n03207941 dishwasher, 534; n15075141 toilet tissue, 999."""
    names = {"n01443537": 2, "n03207941": 1, "n15075141": 2}
    layouts.folders(tmp_path, {"train": names, "val": {"n15075141": 1, "n01440764": 1}}, 10, 12)
    data = ImageNet(str(tmp_path), size=8, resize=10, validation=2)
    assert [label for _, label in data.split("train", 1000).files] == [1, 999]
    assert [label for _, label in data.split("val", 1000).files] == [1, 534, 999]
    test = data.split("test", 1000)
    assert labels(test) == [0, 999]
    check_items(test, (3, 8, 8))
    expected = layouts.pixels(6, 10, 12)[1:9, 2:10]
    assert torch.equal(test[0][0], as_floats(expected))
    with pytest.raises(RequestError, match=r"999, but data\.classes=998"):
        data.split("test", 998)


SUPER_CLASSES = {
    "dog": ("n02085620", "n02113978"),  # Chihuahua, Mexican hairless: the ends of each range
    "cat": ("n02123045", "n02124075"),  # tabby, Egyptian cat
    "frog": ("n01641577", "n01644900"),  # bullfrog, tailed frog
    "turtle": ("n01664065", "n01669191"),  # loggerhead, box turtle
    "bird": ("n01795545", "n01860187"),  # black grouse, black swan
    "primate": ("n02480495", "n02494079"),  # orangutan, squirrel monkey
    "fish": ("n02514041", "n02655020"),  # barracouta, puffer
    "crab": ("n01978287", "n01981276"),  # Dungeness crab, king crab
    "insect": ("n02165105", "n02268443"),  # tiger beetle, dragonfly
}
NEIGHBOURS = (  # just below and above the ranges
    *("n02077923", "n02114367"),  # sea lion, timber wolf
    *("n02120505", "n02125311"),  # grey fox, cougar
    *("n01632777", "n01675722"),  # axolotl, banded gecko
    *("n01784675", "n01871265"),  # centipede, tusker
    *("n02457408", "n02497673"),  # three-toed sloth, Madagascar cat
    *("n02510455", "n02666196"),  # giant panda, abacus
    *("n01968897", "n01983481"),  # chambered nautilus, American lobster
    *("n02138441", "n02268853"),  # meerkat, damselfly
)


def test_restricted_imagenet_keeps_nine_super_classes(tmp_path):
    """The first and the last class of every range are in; the classes next to the ranges are left out."""
    inside = {name: 1 for pair in SUPER_CLASSES.values() for name in pair}
    layouts.folders(tmp_path, {"val": {**inside, **dict.fromkeys(NEIGHBOURS, 1)}})
    data = RestrictedImageNet(str(tmp_path), 8, 8).split("test", 9)
    assert {Path(name).parent.name: label for name, label in data.files} == {
        name: k for k, pair in enumerate(SUPER_CLASSES.values()) for name in pair
    }
    assert list(RESTRICTED) == list(SUPER_CLASSES)
    check_items(data, (3, 8, 8))


def test_restricted_ranges_do_not_overlap_and_cover_203_classes():
    chosen = [k for low, high in RESTRICTED.values() for k in range(low, high + 1)]
    assert len(chosen) == len(set(chosen)) == 203
    names = list(imagenet_classes())
    assert len(names) == 1000
    found = RestrictedImageNet("nowhere").labels(names, names)
    assert [found.count(k) for k in range(9)] == [118, 5, 3, 5, 21, 18, 9, 4, 20]
    assert found.count(None) == 797


def test_timm_calls_the_ends_of_the_ranges_what_the_super_classes_are_called():
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    words = {name: info.label_name_to_description(name, detailed=False).lower() for name in imagenet_classes()}
    expected = {
        "dog": ("chihuahua", "mexican hairless"),
        "cat": ("tabby", "egyptian cat"),
        "frog": ("bullfrog", "tailed frog"),
        "turtle": ("loggerhead", "box turtle"),
        "bird": ("black grouse", "black swan"),
        "primate": ("orangutan", "squirrel monkey"),
        "fish": ("barracouta", "puffer"),
        "crab": ("dungeness crab", "king crab"),
        "insect": ("tiger beetle", "dragonfly"),
    }
    for kind, (low, high) in RESTRICTED.items():
        names = list(words)
        assert (names[low], names[high]) == SUPER_CLASSES[kind]
        assert expected[kind][0] in words[names[low]]
        assert expected[kind][1] in words[names[high]]


# --- GTSRB


def test_gtsrb_validates_on_whole_tracks(tmp_path):
    """One track in five of each class; test labels come from the csv."""
    layouts.gtsrb(tmp_path)
    data = GTSRB(str(tmp_path), size=6)
    parts = {name: data.split(name, 3) for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 3 * 4 * 2, "val": 3 * 2 * 2, "test": 4}
    tracks = {}
    for name in ("train", "val"):
        tracks[name] = {str(Path(path).parent / Path(path).stem.split("_")[0]) for path, _ in parts[name].files}
    assert not tracks["train"] & tracks["val"]
    assert len(tracks["train"] | tracks["val"]) == 18
    assert {path.rsplit("/", 1)[1] for path in tracks["val"]} == {"00000", "00005"}
    assert sorted(labels(parts["val"])) == [0] * 4 + [1] * 4 + [2] * 4
    assert labels(parts["test"]) == [2, 0, 1, 2]
    for part in parts.values():
        check_items(part, (3, 6, 6))
    assert "one track in 5" in data.describe()
    assert "6x6" in data.describe()


def test_gtsrb_is_resized_as_pil_does(tmp_path):
    layouts.gtsrb(tmp_path)
    x = GTSRB(str(tmp_path), size=6).split("test", 3)[1][0]
    small = Image.fromarray(layouts.pixels(1001, 9, 7)).resize((6, 6), Image.Resampling.BILINEAR)
    assert torch.equal(x, as_floats(np.asarray(small)))


def test_gtsrb_labels_are_the_folders_numbers(tmp_path):
    """A copy without some of the classes keeps the labels of the others, as the csv of the test images does."""
    top = layouts.gtsrb(tmp_path)
    shutil.rmtree(top / "GTSRB" / "Training" / "00001")
    assert {label for _, label in GTSRB(str(tmp_path)).split("train", 3).files} == {0, 2}


# --- KITTI


FRAMES = (
    ("Car", "Car", "Pedestrian"),
    ("Cyclist", "Tram", "DontCare", "DontCare", "DontCare"),  # a tie: Cyclist is named first
    ("DontCare",),  # left out
    ("Misc",),
    ("Person_sitting", "Van", "Person_sitting"),
    (),  # left out
    ("Truck",),
    ("Tram",),
)


def test_kitti_labels_and_folds(tmp_path):
    """By hand: Car 0, Cyclist 5, Misc 7, Person_sitting 4, Truck 2, Tram 6."""
    layouts.kitti(tmp_path, FRAMES)
    whole = Kitti(str(tmp_path), (10, 32), fold=1).split("test", 8)
    assert labels(whole) == [0, 5, 7, 4, 2, 6]
    assert [name for name, _ in whole.files] == [f"image_2/00000{i}.png" for i in (0, 1, 3, 4, 6, 7)]
    check_items(whole, (3, 10, 32))
    assert torch.equal(whole[2][0], as_floats(layouts.pixels(3, 10, 32)))
    folds = {name: Kitti(str(tmp_path), fold=3).split(name, 8).files for name in ("train", "val", "test")}
    assert {name: [label for _, label in part] for name, part in folds.items()} == {
        "test": [0, 4],
        "val": [5, 2],
        "train": [7, 6],
    }
    assert "of each 3 frames" in Kitti(str(tmp_path), fold=3).describe()
    check_items(Kitti(str(tmp_path), (5, 16), fold=1).split("test", 8), (3, 5, 16))


# --- Speech Commands


def test_speech_follows_the_official_lists(tmp_path):
    """When all three parts hold clips; clips of background noise are no word."""
    testing = [f"{word}/0000000{k}_nohash_0.wav" for k in (0, 1) for word in ("yes", "no")]
    validation = ["yes/00000002_nohash_0.wav", "no/00000002_nohash_0.wav"]
    layouts.speech(tmp_path, {"yes": SPEAKERS[:5], "no": SPEAKERS[:4]}, validation, testing)
    data = SpeechCommands(str(tmp_path))
    parts = {name: data.split(name, 2) for name in ("train", "val", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 3, "val": 2, "test": 4}
    assert parts["test"].files == list(zip(testing, (1, 0, 1, 0), strict=True))
    assert parts["val"].files == list(zip(validation, (1, 0), strict=True))
    assert not {name for name, _ in parts["train"].files} & {*testing, *validation}
    assert "official lists" in data.describe()
    assert "speaker" not in data.describe()
    for part in parts.values():
        check_items(part, (1, 16000), 32768)


def test_speech_lists_that_were_cut_are_refused(tmp_path):
    """A speaker of the test list who also trains: the rest of the list is gone."""
    layouts.speech(
        tmp_path,
        {"yes": SPEAKERS[:5], "no": SPEAKERS[:4]},
        ["yes/00000002_nohash_0.wav"],
        ["yes/00000000_nohash_0.wav"],
    )
    with pytest.raises(RequestError, match=r"speaker 00000000 is in testing_list\.txt .* not complete"):
        SpeechCommands(str(tmp_path)).split("test", 2)


@pytest.mark.parametrize("lists", ["test only", "none"])
def test_speech_splits_by_speaker_where_the_lists_leave_a_split_empty(tmp_path, lists):
    """Nobody is heard in two splits, whatever the word; these 20 speakers fall 11, 1 and 8."""
    clips = {"yes": SPEAKERS, "no": SPEAKERS}
    testing = [f"{word}/{speaker}_nohash_0.wav" for word, speakers in clips.items() for speaker in speakers]
    folder = layouts.speech(tmp_path, clips, (), testing)
    if lists == "none":
        for name in ("validation_list.txt", "testing_list.txt"):
            (folder / name).unlink()
    data = SpeechCommands(str(tmp_path))
    files = {name: data.split(name, 2).files for name in ("train", "val", "test")}
    speakers = {name: {Path(path).name.split("_")[0] for path, _ in part} for name, part in files.items()}
    assert [len(speakers[name]) for name in ("train", "val", "test")] == [11, 1, 8]
    assert set().union(*speakers.values()) == set(SPEAKERS)
    assert sum(map(len, files.values())) == 40
    assert "split by speaker" in data.describe()
    assert "official" not in data.describe()
    alone = SpeechCommands(str(tmp_path), words=["yes"]).split("test", 1)
    assert {Path(path).name.split("_")[0] for path, _ in alone.files} == speakers["test"]


def test_speech_labels_follow_the_chosen_words(tmp_path):
    layouts.speech(tmp_path, dict.fromkeys(("no", "up", "yes"), SPEAKERS))
    chosen = SpeechCommands(str(tmp_path), words=["yes", "no"]).split("test", 2)
    assert {(Path(path).parent.name, label) for path, label in chosen.files} == {("yes", 0), ("no", 1)}
    every = SpeechCommands(str(tmp_path)).split("test", 3)
    assert {(Path(path).parent.name, label) for path, label in every.files} == {("no", 0), ("up", 1), ("yes", 2)}
    assert "2 words" in SpeechCommands(str(tmp_path), words=["yes", "no"]).describe()


@pytest.mark.parametrize("n", [1, 2000, 15_999, 16_000, 16_001, 40_000])
def test_clips_last_a_second(tmp_path, n):
    """Shorter ones end in silence, longer ones are cut; values are k/32768 exactly, both ends of the range included."""
    folder = layouts.speech(tmp_path, {"yes": SPEAKERS})
    values = layouts.samples(9, max(n, 2))[:n]
    data = SpeechCommands(str(tmp_path)).split("test", 1)
    layouts.clip(folder / data.files[0][0], values)
    x, label, index = data[0]
    assert (tuple(x.shape), x.dtype, label, index) == ((1, 16000), torch.float32, 0, 0)
    expected = np.zeros(16000)
    expected[: min(n, 16000)] = values[:16000] / 32768
    np.testing.assert_array_equal(x[0].double().numpy(), expected)
    assert float(x.min()) == -1
    assert torch.equal(PixelThreat("16bit").prepare(x[None])[0], x)


# --- order and content hash


def every_layout(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[ImageData, int, tuple[str, ...]]]:
    """A copy of each layout that consists of single files: name -> data set, classes, splits."""
    layouts.folders(root / "folder", TREE)
    layouts.folders(root / "imagenet", {"train": {"n01443537": 3, "n02085620": 3}, "val": {"n02085620": 2}})
    layouts.gtsrb(root)
    layouts.kitti(root, FRAMES)
    layouts.speech(root, {"yes": SPEAKERS, "no": SPEAKERS})
    three = ("train", "val", "test")
    return {
        "folder": (ImageFolder(str(root / "folder"), 8, validation=3), 2, three),
        "imagenet": (ImageNet(str(root / "imagenet"), 8, 8, validation=2), 1000, three),
        "restricted": (RestrictedImageNet(str(root / "imagenet"), 8, 8, validation=2), 9, three),
        "gtsrb": (GTSRB(str(root)), 3, three),
        "kitti": (Kitti(str(root), (10, 32), fold=3), 8, three),
        "speech": (SpeechCommands(str(root)), 2, three),
    }


def test_the_order_of_files_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    """Items and hashes are the same whichever way folders are listed; a different folder of the same files too."""
    found = {}
    for place in ("one", "two"):
        with layouts.listing(backwards=place == "two"):
            for name, (data, classes, splits) in every_layout(tmp_path / place, monkeypatch).items():
                for split in splits:
                    part = data.split(split, classes)
                    found[place, name, split] = part.files, part.content_hash
    for (place, name, split), value in found.items():
        assert value == found["one", name, split], (place, name, split)


def test_splits_of_files_do_not_overlap(tmp_path, monkeypatch):
    for name, (data, classes, splits) in every_layout(tmp_path, monkeypatch).items():
        paths = [[part.root / path for path, _ in part.files] for part in (data.split(s, classes) for s in splits)]
        together = [path for part in paths for path in part]
        assert len(set(together)) == len(together), name
        assert all(paths), name


@pytest.mark.parametrize("name", ["folder", "imagenet", "restricted", "gtsrb", "kitti", "speech"])
def test_content_hash_notices_other_files_and_labels_and_nothing_else(tmp_path, monkeypatch, name):
    data, classes, _ = every_layout(tmp_path, monkeypatch)[name]
    part = data.split("test", classes)
    first = part.content_hash
    assert len(first) == 16
    path = part.root / part.files[0][0]
    path.touch()
    (tmp_path / "notes.txt").write_text("no part of the data")
    assert data.split("test", classes).content_hash == first
    part.files[0] = (part.files[0][0], part.files[0][1] + 1)
    relabelled = part.content_hash
    part.files.pop(0)
    fewer = part.content_hash
    layouts.cut(path, 0.9)
    changed = data.split("test", classes).content_hash
    assert len({first, relabelled, fewer, changed}) == 4


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
    return layouts.folders(root, TREE)


def three_frames(root: Path) -> Path:
    return layouts.kitti(root, [("Car",), ("Van",), ("Car",)])


def two_words(root: Path) -> Path:
    folder = layouts.speech(root, {"yes": SPEAKERS, "no": SPEAKERS})
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
    "folder without training images": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/train is missing", "put training images there"),
        lambda r, _: layouts.folders(r, TEST_IMAGES), "train",
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
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png is damaged", *RESTORE),
        spoiled(tree, "test/dog/1.png", layouts.cut),
    ),
    "picture empty": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png is damaged", *RESTORE),
        spoiled(tree, "test/dog/1.png", empty),
    ),
    "picture that is text": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png is damaged", *RESTORE),
        spoiled(tree, "test/dog/1.png", text("dear")),
    ),
    "picture with a huge size in its header": Mistake(
        lambda r: ImageFolder(r, 8), ("{root}/test/dog/1.png is damaged", *RESTORE),
        spoiled(tree, "test/dog/1.png", huge),
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
        GTSRB, ("{root}/gtsrb/GTSRB/Final_Test/Images/00002.ppm is damaged", *RESTORE),
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
        lambda r: Kitti(r, fold=1), ("{root}/Kitti/raw/training/image_2/000001.png is damaged", *RESTORE),
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
        SpeechCommands, (f"{TESTED} is damaged", *RESTORE),
        spoiled(two_words, TESTED, lambda path: layouts.cut(path, 0.005)),
    ),
    "clip cut in the samples": Mistake(
        SpeechCommands, (f"{TESTED} is damaged", *RESTORE), spoiled(two_words, TESTED, layouts.cut)
    ),
    "clip at 8 kHz": Mistake(
        SpeechCommands, (f"{TESTED} is damaged", "8000 Hz", "16000 Hz"), spoiled(two_words, TESTED, rate(8000))
    ),
    "clip in stereo": Mistake(
        SpeechCommands, (f"{TESTED} is damaged", "2 channels"), spoiled(two_words, TESTED, rate(16000, 2))
    ),
    "clip that is text": Mistake(SpeechCommands, (f"{TESTED} is damaged",), spoiled(two_words, TESTED, text("yes"))),
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
                r, {"yes": SPEAKERS}, ["yes/00000002_nohash_0.wav"], ["yes/00000003_nohash_0.wav"]
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
    layouts.speech(tmp_path, {"yes": SPEAKERS[:5]}, **lists)
    data = SpeechCommands(str(tmp_path))
    assert [len(data.split(name, 1)) for name in ("train", "val", "test")] == [3, 1, 1]


# --- mistakes on the command line


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Callable[..., str]:
    """Writes an untrained network for a configuration: enough for everything that fails before a certificate."""

    def write(*overrides: str) -> str:
        path = tmp_path_factory.mktemp("network") / "network.ckpt"
        torch.save(hydra.utils.instantiate(compose("certify", *overrides).model).state_dict(), path)
        return str(path)

    return write


def one_sentence(ended, *words: str) -> None:
    """Exit status 2, no traceback, one line on stderr that starts with gsmooth and holds the words."""
    if ended.error is not None:
        raise AssertionError(f"the exception escaped: {ended.error!r}; stderr: {ended.err}") from ended.error
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert len(ended.lines) == 1, ended.err
    assert ended.err.startswith("gsmooth")
    for word in words:
        assert word in ended.err


OF_TREE = ("data=folder", "data.size=8", "data.classes=2", "data.dataset.root=data")

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
    "resize below the crop": ((*OF_TREE, "data.dataset.resize=4"), ("resize=4", "data.size=8"), tree),
    "validation zero": ((*OF_TREE, "data.dataset.validation=0"), ("data.dataset.validation",), tree),
    "too few classes": (
        OF_TREE, ("labels run from 0 to 2", "data.classes=2"),
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
    ended = run_main("train", *QUIET, *OF_TREE, f"data.workers={workers}", "train.epochs=1", "store=run")
    one_sentence(ended, "data/train/dog/3.png is damaged", *RESTORE)
    assert not (here / "run" / "classifier.ckpt").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_met_while_certifying_is_one_sentence(here, network, workers):
    """The first picture is certified and kept."""
    layouts.cut(tree(here / "data") / "test" / "dog" / "0.png")
    overrides = (*SMALL, *OF_TREE, f"data.workers={workers}", "images.in_flight=1")
    ended = run_main("certify", *overrides, f"checkpoint={network(*overrides)}", "store=run")
    one_sentence(ended, "data/test/dog/0.png is damaged", *RESTORE)
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


# --- laziness


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Paths of the pictures decoded so far, in this process."""
    seen: list[str] = []
    reader = folder_module.default_loader

    def read(path: str) -> Image.Image:
        seen.append(path)
        return reader(path)

    monkeypatch.setattr(folder_module, "default_loader", read)
    return seen


def test_a_folder_decodes_only_what_is_asked_for(tmp_path, reads):
    layouts.folders(tmp_path, {"train": {"a": 9, "b": 2}, "test": {"a": 20, "b": 20}})
    module = ImageDataModule(ImageFolder(str(tmp_path), 8), 2, every=8, in_flight=2, workers=0)
    for name in ("train", "val", "test"):
        module.split(name).content_hash  # noqa: B018, reading the property is the point
    assert len(module.visited) == 5
    assert reads == []
    module.image(33)
    assert [str(Path(path).relative_to(tmp_path)) for path in reads] == ["test/b/13.png"]
    reads.clear()
    module.done = {0, 8}
    assert [i for batch in module.predict_dataloader() for i in batch[2].tolist()] == [16, 24, 32]
    assert [str(Path(path).relative_to(tmp_path)) for path in reads] == [
        "test/a/16.png",
        "test/b/04.png",
        "test/b/12.png",
    ]


def test_pictures_are_let_go_of(tmp_path, monkeypatch):
    """However many pictures are read, no decoded one is kept."""
    layouts.folders(tmp_path, {"test": {"a": 30}})
    made: list[weakref.ref] = []
    reader = folder_module.default_loader

    def read(path: str) -> Image.Image:
        image = reader(path)
        made.append(weakref.ref(image))
        return image

    monkeypatch.setattr(folder_module, "default_loader", read)
    data = ImageFolder(str(tmp_path), 8).split("test", 1)
    alive = []
    for i in range(30):
        data[i]
        alive.append(sum(ref() is not None for ref in made))
    assert len(made) == 30
    assert max(alive) <= 1


def test_loader_processes_are_sent_names_and_no_pictures(tmp_path):
    """A pickled split grows by tens of bytes a picture, whatever the pictures' size."""
    layouts.folders(tmp_path, {"few": {"a": 2}, "many": {"a": 22}}, 64, 64)
    sizes = [len(pickle.dumps(ImageFolder(str(tmp_path / name), 64).split("test", 1))) for name in ("few", "many")]
    assert (sizes[1] - sizes[0]) / 20 < 60 < 64 * 64 * 3


def test_a_report_reads_the_pictures_it_shows(here, network, reads):
    """Its contact sheet shows 16; 25 were certified out of 60."""
    layouts.folders(here / "data", {"test": {"a": 30, "b": 30}})
    small = (o for o in SMALL if not o.startswith(("images.", "threat.", "error.", "law.", "certify")))
    overrides = (*small, *OF_TREE, "transform=rotation", "threat=rotation", "law.sigma=20", "error.draws=8",
                 "error.choose=4", "error.points=3", "sampling.n0=8", "sampling.n=32", "images.every=2",
                 "images.first=25", "data.workers=0")  # fmt: skip
    run_task("certify", *overrides, f"checkpoint={network(*overrides)}", "store=run")
    assert len(records(here / "run")) == 25
    reads.clear()
    run_task("report", "stores=run")
    assert (here / "run" / "report.png").exists()
    assert len(reads) == len(set(reads)) == 16


# --- augmentation


class Noted:
    """A random crop that notes what it is given."""

    def __init__(self, size: int):
        self.crop, self.seen = v2.RandomCrop(size), []

    def __call__(self, raw: Any) -> Any:
        self.seen.append(raw)
        return self.crop(raw)


class Draw:
    """Replaces a picture by one number drawn at random."""

    def __call__(self, raw: Any) -> Tensor:
        return torch.rand(1)


class Refuse:
    """Must not be called."""

    def __call__(self, raw: Any) -> Any:
        raise AssertionError("augmentation where none belongs")


def test_augmentation_of_files_sees_the_picture_as_it_is_on_disk(tmp_path):
    """Before resizing; its result is the item."""
    layouts.folders(tmp_path, TREE, height=9, width=12)
    augment = Noted(5)
    module = ImageDataModule(ImageFolder(str(tmp_path), 8), 2, batch_size=4, augment=augment, workers=0)
    batches = list(module.train_dataloader())
    assert {x.shape[1:] for x, _, _ in batches} == {(3, 5, 5)}
    assert all(isinstance(raw, Image.Image) and raw.size == (12, 9) for raw in augment.seen)
    assert sorted(i for batch in batches for i in batch[2].tolist()) == list(range(len(module.split("train"))))
    assert all(torch.equal(x, torch.round(x * 255) / 255) for x, _, _ in batches)
    augment.seen.clear()
    for loader in (module.val_dataloader(), module.predict_dataloader()):
        assert {x.shape[1:] for x, _, _ in loader} == {(3, 8, 8)}
    assert augment.seen == []


def test_augmentation_of_images_in_memory_sees_bytes():
    augment = Noted(6)
    module = ImageDataModule(Digits(), 10, augment=augment, workers=0, indices=[4, 2])
    x, y, i = next(iter(module.train_dataloader()))
    assert x.shape == (128, 1, 6, 6)
    assert len(augment.seen) == 128
    train = module.split("train")
    for raw, index, label in zip(augment.seen, i.tolist(), y.tolist(), strict=True):
        assert raw.dtype == torch.uint8
        assert torch.equal(raw, train.images[index])
        assert label == int(train.labels[index])
    augment.seen.clear()
    x, _, i = next(iter(module.predict_dataloader()))
    assert (i.tolist(), augment.seen) == ([4, 2], [])
    assert torch.equal(x, module.split("test").images[[4, 2]].float() / 16)
    assert next(iter(module.val_dataloader()))[0].shape == (100, 1, 8, 8)


def test_augmentation_of_sound_sees_the_waveform(tmp_path):
    layouts.speech(tmp_path, {"yes": SPEAKERS})
    seen = []

    def shift(wave: Tensor) -> Tensor:
        seen.append(tuple(wave.shape))
        return torch.roll(wave, 100, -1)

    module = ImageDataModule(SpeechCommands(str(tmp_path)), 1, augment=shift, workers=0)
    (x, _, i), *_ = list(module.train_dataloader())
    assert set(seen) == {(1, 16000)}
    whole = torch.stack([module.split("train")[k][0] for k in i.tolist()])
    assert torch.equal(x, torch.roll(whole, 100, -1))
    assert not torch.equal(x, whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_augmentation_follow_from_the_seed_and_the_step(tmp_path, workers):
    """Whatever was drawn before; another seed or a later pass gives others; no two pictures share a draw."""
    layouts.folders(tmp_path, {"train": {"a": 25}, **TEST_IMAGES})
    source = ImageFolder(str(tmp_path), 8)

    def passes(seed: int, steps: tuple[int, ...]) -> list[list[tuple[int, float]]]:
        module = ImageDataModule(source, 1, batch_size=4, augment=Draw(), workers=workers, seed=seed)
        loader, drawn = module.train_dataloader(), []
        for step in steps:
            module.trainer = SimpleNamespace(global_step=step, global_rank=0)
            torch.rand(step + 1)
            drawn.append(
                [(i, x) for xs, _, ids in loader for i, x in zip(ids.tolist(), xs[:, 0].tolist(), strict=True)]
            )
        return drawn

    torch.manual_seed(0)
    first, second = passes(3, (0, 6))
    torch.manual_seed(1)
    assert passes(3, (6,)) == [second]
    assert passes(3, (0,)) == [first]
    (other,) = passes(4, (0,))
    orders = [[i for i, _ in drawn] for drawn in (first, second, other)]
    assert all(sorted(order) == list(range(22)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert len({x for drawn in (first, second, other) for _, x in drawn}) == 66


def test_calibration_and_certification_see_pictures_as_they_are(here, network):
    """error=distribution calibrates on training images; augmentation stays out, though training would use it."""
    refuse = "data.augment={_target_:test_data_files.Refuse}"
    small = (o for o in SMALL if not o.startswith("error."))
    overrides = (*small, "error=distribution", "error.draws=64", "error.rho=0.2", "error.points=3", refuse)
    with pytest.raises(AssertionError, match="augmentation where none belongs"):
        run_task("train", *QUIET, refuse, "train.epochs=1", "store=trained")
    run_task("bound", *overrides, f"checkpoint={network(*overrides)}", "store=run")
    assert len(records(here / "run")) == 6
