"""Data sets in memory: digits and generated idx files; subsets and the loaders' order."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from gsmooth_lightning.data import MNIST, Digits, FashionMNIST, TensorImages, subset
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ImageDataModule


def write_idx(folder: Path, train: int = 5100, test: int = 30) -> None:
    """A tiny set in MNIST's layout: images of one grey value, labels 0..9 in turn."""
    folder.mkdir(parents=True)
    for name, n in (("train", train), ("t10k", test)):
        pixels = np.broadcast_to((np.arange(n) % 256).astype(np.uint8)[:, None, None], (n, 28, 28))
        images = struct.pack(">IIII", 2051, n, 28, 28) + pixels.tobytes()
        labels = struct.pack(">II", 2049, n) + (np.arange(n) % 10).astype(np.uint8).tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)


def test_digits_splits_do_not_overlap_and_hold_every_image():
    parts = {name: Digits().split(name, 10) for name in ("train", "val", "test")}
    assert [len(p) for p in parts.values()] == [1297, 100, 400]
    image, label, index = parts["test"][0]
    assert image.shape == (1, 8, 8)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    assert 0 <= label < 10
    assert index == 0
    rows = torch.cat([p.images.flatten(1) for p in parts.values()])
    assert len(rows) == 1797


@pytest.mark.parametrize("source", [MNIST, FashionMNIST])
def test_idx_layout_on_generated_files(tmp_path, source):
    write_idx(tmp_path / source.__name__ / "raw")
    data = source(str(tmp_path))
    train, val, test = (data.split(name, 10) for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (100, 5000, 30)
    image, label, _ = test[7]
    assert label == 7
    torch.testing.assert_close(image, torch.full((1, 28, 28), 7 / 255))
    assert int(val[0][1]) == 100 % 10  # the validation split is the end of the training file


def test_missing_and_truncated_files_name_the_path_and_the_fix(tmp_path):
    with pytest.raises(RequestError, match=r"MNIST/raw does not hold .* set data\.dataset\.root"):
        MNIST(str(tmp_path)).split("test", 10)
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw)
    whole = (raw / "t10k-images-idx3-ubyte").read_bytes()
    (raw / "t10k-images-idx3-ubyte").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match="damaged idx file"):
        MNIST(str(tmp_path)).split("test", 10)


def test_batches_are_cut_at_once_and_equal_single_items():
    data = Digits().split("val", 10)
    batch = data.__getitems__([3, 50, 7])
    for (image, label, index), i in zip(batch, [3, 50, 7], strict=True):
        assert index == i
        torch.testing.assert_close(image, data[i][0])
        assert int(label) == data[i][1]


def test_labels_outside_the_classes_are_refused():
    with pytest.raises(RequestError, match=r"labels run from 0 to 9, but data\.classes=5"):
        Digits().split("test", 5)
    with pytest.raises(RequestError, match="3 images but 2 labels"):
        TensorImages(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2), 10)


def test_subsets_are_deterministic_and_checked():
    data = Digits().split("test", 10)
    assert list(subset(data, every=100).indices) == [0, 100, 200, 300]
    assert list(subset(data, every=100, first=2).indices) == [0, 100]
    assert list(subset(data, indices=[5, 2]).indices) == [5, 2]
    for wrong in ({"every": 0}, {"first": 0}, {"indices": [400]}, {"indices": []}):
        with pytest.raises(RequestError):
            subset(data, **wrong)


def test_predict_visits_what_is_left():
    module = ImageDataModule(Digits(), 10, every=100, in_flight=3)
    module.done = {100}
    assert [i for batch in module.predict_dataloader() for i in batch[2].tolist()] == [0, 200, 300]
    torch.testing.assert_close(module.image(200), Digits().split("test", 10)[200][0])
