"""How inputs are read: only when asked for, in loader processes, augmented for training alone."""

import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

import layouts
from conftest import QUIET, SMALL, records, run_task
from gsmooth_lightning.data import (
    Digits,
    ImageFolder,
    SpeechCommands,
)
from gsmooth_lightning.data import folder as folder_module
from gsmooth_lightning.lit import ImageDataModule

# --- laziness


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Paths of the pictures decoded so far, in this process."""
    seen: list[str] = []
    reader = folder_module.read_image

    def read(path: str) -> Image.Image:
        seen.append(path)
        return reader(path)

    monkeypatch.setattr(folder_module, "read_image", read)
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
    reader = folder_module.read_image

    def read(path: str) -> Image.Image:
        image = reader(path)
        made.append(weakref.ref(image))
        return image

    monkeypatch.setattr(folder_module, "read_image", read)
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
    overrides = (*small, *layouts.OF_TREE, "transform=rotation", "threat=rotation", "law.sigma=20", "error.draws=8",
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
    layouts.folders(tmp_path, layouts.TREE, height=9, width=12)
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
    layouts.speech(tmp_path, {"yes": layouts.SPEAKERS})
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
    layouts.folders(tmp_path, {"train": {"a": 25}, **layouts.TEST_IMAGES})
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
    refuse = "data.augment={_target_:test_loading.Refuse}"
    small = (o for o in SMALL if not o.startswith("error."))
    overrides = (*small, "error=distribution", "error.calibration=40", "error.draws=64", "error.rho=0.2", refuse)
    with pytest.raises(AssertionError, match="augmentation where none belongs"):
        run_task("train", *QUIET, refuse, "train.epochs=1", "store=trained")
    run_task("certify", *overrides, f"checkpoint={network(*overrides)}", "store=run")
    assert len(records(here / "run" / "bounds")) == 40  # what it calibrated on
    assert len(records(here / "run")) == 6
