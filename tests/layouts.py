"""Tiny copies of the layouts in which data sets are published: what a user's folder looks like, a few files large."""

import contextlib
import hashlib
import os
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from torchvision import datasets

TEST_IMAGES = {"test": {"cat": 2, "dog": 2}}
TREE = {"train": {"cat": 6, "dog": 5}, **TEST_IMAGES}
SPEAKERS = [f"{i:08x}" for i in range(20)]

OF_TREE = ("data=folder", "data.size=8", "data.classes=2", "data.dataset.root=data")
"""Overrides that read a tree like `TREE` below the folder `data`."""

FIELDS = "0.00 0 -1.50 10.00 10.00 30.00 30.00 1.50 1.50 3.50 1.00 1.50 20.00 -1.50"
"""A line of a KITTI label file, without the kind of object."""


def pixels(k: int, height: int = 8, width: int = 8) -> np.ndarray:
    """Picture k: (height, width, 3) random bytes."""
    return np.random.default_rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(path: Path, k: int = 0, height: int = 8, width: int = 8) -> None:
    """Writes picture k, without loss where the format allows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(k, height, width)).save(path)


def cut(path: Path, keep: float = 0.5) -> None:
    """Truncates a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])


def cifar_pixels(n: int) -> np.ndarray:
    """(n, 3, 32, 32) bytes; the first two of image i are its number."""
    place = np.arange(3 * 32 * 32).reshape(3, 32, 32)
    images = (np.arange(n)[:, None, None, None] * 13 + place * 31).astype(np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(n), 256)
    return images


def cifar(
    root: Path, source: type[datasets.CIFAR10], monkeypatch: pytest.MonkeyPatch, train: int = 5020, test: int = 12
) -> Path:
    """Batches as published, with labels in turn (backwards for the test batch); torchvision then expects these MD5s."""
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    fine = source is datasets.CIFAR100
    classes = 100 if fine else 10

    def save(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batches(listed: Sequence[Sequence[str]], images: np.ndarray, labels: np.ndarray) -> list[list[str]]:
        made = []
        parts = zip(np.array_split(images, len(listed)), np.array_split(labels, len(listed)), strict=True)
        for (name, _), (part, of_part) in zip(listed, parts, strict=True):
            content = {"data": part.reshape(-1, 3072), "fine_labels" if fine else "labels": of_part.tolist()}
            made.append([name, save(name, content)])
        return made

    whole = cifar_pixels(train + test)
    up, down = np.arange(train) % classes, classes - 1 - np.arange(test) % classes
    monkeypatch.setattr(source, "train_list", batches(source.train_list, whole[:train], up))
    monkeypatch.setattr(source, "test_list", batches(source.test_list, whole[train:], down))
    names = {source.meta["key"]: [f"class {k}" for k in range(classes)]}
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": save(source.meta["filename"], names)})
    return folder


def cifar_c(root: Path, size: int = 4, corruptions: Collection[str] = ("fog", "gaussian_blur")) -> Path:
    """Severity s of corruption c holds images of the one value 10 s + c; labels count from 0 in each severity."""
    folder = root / "CIFAR-10-C"
    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", np.tile(np.arange(size), 5))
    for c, corruption in enumerate(corruptions):
        values = (10 * (1 + np.repeat(np.arange(5), size)) + c).astype(np.uint8)
        np.save(folder / f"{corruption}.npy", np.broadcast_to(values[:, None, None, None], (5 * size, 32, 32, 3)))
    return folder


def gtsrb(root: Path, classes: int = 3, tracks: int = 6, frames: int = 2, test: Sequence[int] = (2, 0, 1, 2)) -> Path:
    """Track t of class c holds frames of 9x7 pixels; picture number 100 c + 10 t + frame, 1000 + i in the test."""
    top = root / "gtsrb"
    for c in range(classes):
        for t in range(tracks):
            for f in range(frames):
                path = top / "GTSRB" / "Training" / f"{c:05d}" / f"{t:05d}_{f:05d}.ppm"
                picture(path, 100 * c + 10 * t + f, 9, 7)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for i, label in enumerate(test):
        picture(top / "GTSRB" / "Final_Test" / "Images" / f"{i:05d}.ppm", 1000 + i, 9, 7)
        rows.append(f"{i:05d}.ppm;7;9;1;1;6;8;{label}")
    (top / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return top


def folders(root: Path, tree: Mapping[str, Mapping[str, int]], height: int = 8, width: int = 8) -> Path:
    """{"train": {"cat": 3}} -> root/train/cat/{0,1,2}.png; pictures are numbered in the order of the tree.

    Names have as many digits as the last: alphabetical order is the order of numbers.
    """
    k = 0
    for split, classes in tree.items():
        for name, count in classes.items():
            for i in range(count):
                picture(root / split / name / f"{i:0{len(str(count - 1))}d}.png", k, height, width)
                k += 1
    return root


def kitti(root: Path, frames: Sequence[Sequence[str]], height: int = 10, width: int = 32) -> Path:
    """Frame i shows picture i and holds the listed kinds of objects."""
    top = root / "Kitti" / "raw" / "training"
    (top / "label_2").mkdir(parents=True)
    for i, kinds in enumerate(frames):
        picture(top / "image_2" / f"{i:06d}.png", i, height, width)
        (top / "label_2" / f"{i:06d}.txt").write_text("".join(f"{kind} {FIELDS}\n" for kind in kinds))
    return top


def samples(k: int, n: int = 16_000) -> np.ndarray:
    """n random 16-bit samples; the first two are the ends of the range."""
    values = np.random.default_rng(k).integers(-32768, 32768, n, dtype=np.int16)
    values[:2] = -32768, 32767
    return values


def clip(path: Path, values: np.ndarray, rate: int = 16_000, subtype: str = "PCM_16") -> None:
    """Writes a wav file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, values, rate, subtype=subtype)


def speech(
    root: Path, clips: Mapping[str, Sequence[str]], validation: Sequence[str] = (), testing: Sequence[str] = ()
) -> Path:
    """{"yes": ["0a7c2a8d"]} -> yes/0a7c2a8d_nohash_0.wav, short to keep tests fast, with the two lists."""
    folder = root / "SpeechCommands" / "speech_commands_v0.02"
    k = 0
    for word, speakers in clips.items():
        for speaker in speakers:
            clip(folder / word / f"{speaker}_nohash_0.wav", samples(k, 1000))
            k += 1
    clip(folder / "_background_noise_" / "hum.wav", samples(0))
    for name, listed in (("validation_list.txt", validation), ("testing_list.txt", testing)):
        (folder / name).write_text("".join(f"{line}\n" for line in listed))
    return folder


class _Entries:
    """What os.scandir returns, with the entries in a chosen order."""

    def __init__(self, entries: list[os.DirEntry]):
        self._entries = iter(entries)

    def __iter__(self) -> Iterator[os.DirEntry]:
        return self

    def __next__(self) -> os.DirEntry:
        return next(self._entries)

    def __enter__(self) -> "_Entries":
        return self

    def __exit__(self, *_: object) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def listing(backwards: bool) -> Iterator[None]:
    """A file system that lists every folder in alphabetical order, or backwards."""
    listdir: Callable = os.listdir
    scandir: Callable = os.scandir

    def scan(path: str = ".") -> _Entries:
        with scandir(path) as entries:
            return _Entries(sorted(entries, key=lambda entry: entry.name, reverse=backwards))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=backwards))
        patch.setattr(os, "scandir", scan)
        yield
