"""Data sets on generated copies of their layouts: items, splits, order, content."""

import hashlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

import layouts
from gsmooth_lightning.data import (
    CIFAR10,
    CIFAR10C,
    CIFAR100,
    GTSRB,
    ImageData,
    ImageFolder,
    ImageNet,
    Inputs,
    Kitti,
    RestrictedImageNet,
    SpeechCommands,
    base,
)
from gsmooth_lightning.data.folder import RESTRICTED, imagenet_classes
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.threat import PixelThreat


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
    layouts.folders(tmp_path, layouts.TREE)
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
    layouts.speech(tmp_path, {"yes": layouts.SPEAKERS[:5], "no": layouts.SPEAKERS[:4]}, validation, testing)
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
        {"yes": layouts.SPEAKERS[:5], "no": layouts.SPEAKERS[:4]},
        ["yes/00000002_nohash_0.wav"],
        ["yes/00000000_nohash_0.wav"],
    )
    with pytest.raises(RequestError, match=r"speaker 00000000 is in testing_list\.txt .* not complete"):
        SpeechCommands(str(tmp_path)).split("test", 2)


@pytest.mark.parametrize("lists", ["test only", "none"])
def test_speech_splits_by_speaker_where_the_lists_leave_a_split_empty(tmp_path, lists):
    """Nobody is heard in two splits, whatever the word; these 20 speakers fall 11, 1 and 8."""
    clips = {"yes": layouts.SPEAKERS, "no": layouts.SPEAKERS}
    testing = [f"{word}/{speaker}_nohash_0.wav" for word, speakers in clips.items() for speaker in speakers]
    folder = layouts.speech(tmp_path, clips, (), testing)
    if lists == "none":
        for name in ("validation_list.txt", "testing_list.txt"):
            (folder / name).unlink()
    data = SpeechCommands(str(tmp_path))
    files = {name: data.split(name, 2).files for name in ("train", "val", "test")}
    speakers = {name: {Path(path).name.split("_")[0] for path, _ in part} for name, part in files.items()}
    assert [len(speakers[name]) for name in ("train", "val", "test")] == [11, 1, 8]
    assert set().union(*speakers.values()) == set(layouts.SPEAKERS)
    assert sum(map(len, files.values())) == 40
    assert "split by speaker" in data.describe()
    assert "official" not in data.describe()
    alone = SpeechCommands(str(tmp_path), words=["yes"]).split("test", 1)
    assert {Path(path).name.split("_")[0] for path, _ in alone.files} == speakers["test"]


def test_speech_labels_follow_the_chosen_words(tmp_path):
    layouts.speech(tmp_path, dict.fromkeys(("no", "up", "yes"), layouts.SPEAKERS))
    chosen = SpeechCommands(str(tmp_path), words=["yes", "no"]).split("test", 2)
    assert {(Path(path).parent.name, label) for path, label in chosen.files} == {("yes", 0), ("no", 1)}
    every = SpeechCommands(str(tmp_path)).split("test", 3)
    assert {(Path(path).parent.name, label) for path, label in every.files} == {("no", 0), ("up", 1), ("yes", 2)}
    assert "2 words" in SpeechCommands(str(tmp_path), words=["yes", "no"]).describe()


@pytest.mark.parametrize("n", [1, 2000, 15_999, 16_000, 16_001, 40_000])
def test_clips_last_a_second(tmp_path, n):
    """Shorter ones end in silence, longer ones are cut; values are k/32768 exactly, both ends of the range included."""
    folder = layouts.speech(tmp_path, {"yes": layouts.SPEAKERS})
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
    layouts.folders(root / "folder", layouts.TREE)
    layouts.folders(root / "imagenet", {"train": {"n01443537": 3, "n02085620": 3}, "val": {"n02085620": 2}})
    layouts.gtsrb(root)
    layouts.kitti(root, FRAMES)
    layouts.speech(root, {"yes": layouts.SPEAKERS, "no": layouts.SPEAKERS})
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


def test_content_hash_of_large_data_covers_names_labels_and_sizes(tmp_path, monkeypatch):
    """Beyond `READ` bytes in all, files are not opened, and the hash says so; up to it they are."""
    layouts.folders(tmp_path, {"test": {"a": 2, "b": 1}})
    part = ImageFolder(str(tmp_path), 8).split("test", 2)
    path = part.root / part.files[0][0]
    sizes = sum((part.root / name).stat().st_size for name, _ in part.files)

    def hashes() -> tuple[str, str]:
        found = []
        for limit in (sizes, sizes - 1):
            monkeypatch.setattr(base, "READ", limit)
            found.append(part.content_hash)
        return found[0], found[1]

    read, listed = hashes()
    assert listed.endswith(" (names, labels and sizes)")
    assert listed[:16] != read
    content = path.read_bytes()
    path.write_bytes(content[::-1])  # of the same size
    assert hashes()[0] != read
    assert hashes()[1] == listed
    path.write_bytes(content[:-1])
    assert part.content_hash != listed
    path.write_bytes(content)
    assert hashes() == (read, listed)
    name, label = part.files[0]
    part.files[0] = (name, label + 1)
    assert hashes()[1] != listed
    path.rename(path.with_name("renamed.png"))
    part.files[0] = (name.replace(path.name, "renamed.png"), label)
    assert hashes()[1] != listed
    part.files.append(("a/gone.png", 0))
    with pytest.raises(RequestError, match=r"gone\.png is missing"):
        hashes()
