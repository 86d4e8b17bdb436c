"""`gsmooth corrupt`: accuracies that are known, resuming, mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

import layouts
from conftest import QUIET, one_sentence, records, run_main, run_task, snapshot, timeless
from gsmooth_lightning.data import Digits
from gsmooth_lightning.threat import PixelThreat


class Steps(torch.nn.Module):
    """The class is the image's mean, in steps of 25 / 255."""

    def __init__(self):
        super().__init__()
        self.centres = torch.nn.Parameter(torch.arange(10) * 25.0)

    def forward(self, x):
        return -((x.mean((1, 2, 3))[:, None] * 255 - self.centres) ** 2)


def class_of(pixels: np.ndarray) -> np.ndarray:
    """What Steps says of bytes (..., h, w, c)."""
    return np.abs(pixels.mean((-1, -2, -3))[..., None] - np.arange(10) * 25).argmin(-1)


STEPS = (
    *QUIET,
    f"model._target_={__name__}.Steps",
    "model=custom",
    "preprocess=none",
    "transform=identity",
    "threat=l2",
    "law=none",
    "noise.sigma=0.01",
    "n=16",
    "block=16",
    "checkpoint=steps.ckpt",
)


@pytest.fixture
def steps(here: Path) -> Path:
    torch.save(Steps().state_dict(), here / "steps.ckpt")
    return here


def cifar_c(root: Path, size: int = 12) -> Path:
    """A folder for the images of `layouts.cifar`: at severity s the last 2 s of 12 images look like another class."""
    folder = root / "CIFAR-10-C"
    folder.mkdir()
    labels = 9 - np.arange(size) % 10
    looks = np.stack([np.where(np.arange(size) < size - 2 * s, labels, (labels + 1) % 10) for s in range(1, 6)])
    np.save(folder / "labels.npy", np.tile(labels, 5))
    for name in ("zoom_blur", "fog"):
        np.save(
            folder / f"{name}.npy", np.broadcast_to((looks * 25).reshape(-1, 1, 1, 1), (60, 32, 32, 3)).astype("u1")
        )
    return folder


def cells(path: Path) -> dict[str, dict[str, str]]:
    """The second table of a report: row -> column -> cell."""
    lines = (path / "report.md").read_text().split("\n\n")[1].strip().splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def test_accuracy_on_a_folder(steps, monkeypatch):
    """Known labels, known accuracies; beside them what GSmooth printed; another file is another run."""
    layouts.cifar(steps / "data", datasets.CIFAR10, monkeypatch)
    folder = cifar_c(steps)
    overrides = (*STEPS, "data=cifar10", f"folder={folder}", "corruptions=[zoom_blur,fog]", "store=run")
    ended = run_main("corrupt", *overrides, "severities=[1,2,5]")
    assert (ended.code, ended.error) == (0, None), ended.err
    table = cells(steps / "run")
    accuracies = {"severity 1": "83.3%", "severity 2": "66.7%", "severity 5": "16.7%", "mean": "55.6%"}
    assert list(table)[:2] == ["clean, base", "clean, smoothed"]
    for name in ("zoom_blur", "fog"):
        for classifier in ("base", "smoothed"):
            row = table[f"{name}, {classifier}"]
            assert {key: row[key] for key in accuracies} == accuracies
    assert (table["zoom_blur, smoothed"]["GSmooth (published)"], table["fog, smoothed"]["TSS (published)"]) == (
        "77.1%",
        "",
    )
    clean = layouts.cifar_pixels(5032)[5020:].transpose(0, 2, 3, 1)
    expected = np.mean(class_of(clean) == 9 - np.arange(12) % 10)
    assert table["clean, base"]["mean"] == f"{expected:.1%}"
    found = records(steps / "run")
    assert [r["corruption"][0] for r in found] == ["clean"] * 12
    assert found[11]["votes"][1] == np.eye(10)[(found[11]["label"] + 1) % 10].astype(int).dot(16).tolist()
    pixels = np.load(folder / "fog.npy")
    np.save(folder / "fog.npy", 255 - pixels)
    one_sentence(run_main("corrupt", *overrides, "severities=[1,2,5]"), "another run", "files differ")


def test_our_files_are_judged_as_they_are_saved(steps):
    """Brightness of digits: the base class of the 8-bit file of each severity; votes do not depend on slots."""
    overrides = (*STEPS, "images.every=40", "corruptions=[brightness,motion_blur]", "severities=[5,1]")
    run_task("corrupt", *overrides, "store=run")
    prepare = PixelThreat("8bit", 28).prepare
    for record in records(steps / "run"):
        x = Digits().split("test", 10)[record["index"]][0]
        bytes_ = (prepare(x[None])[0].permute(1, 2, 0).double() * 255).numpy()
        saved = [np.clip(np.round(bytes_ + amount * 255), 0, 255) for amount in (0, 0.3, 0.05)]
        assert record["base"][:3] == [int(class_of(file)) for file in saved]
        assert list(zip(record["corruption"], record["severity"], strict=True))[1:4] == [
            ("brightness", 5),
            ("brightness", 1),
            ("motion_blur", 5),
        ]
        assert np.sum(record["votes"], 1).tolist() == [16] * 5
    assert "published" not in (steps / "run" / "report.md").read_text()
    run_task("corrupt", *overrides, "images.in_flight=3", "store=again")
    assert timeless(steps / "run")["records.jsonl"] == timeless(steps / "again")["records.jsonl"]


def test_interrupted_run_goes_on(checkpoint, here):
    """Finished images are kept, a torn line is made again, and the bytes are those of a whole run."""
    overrides = (*QUIET, "noise.sigma=0.25", "law.sigma=20", f"checkpoint={checkpoint}", "n=8", "severities=[2]")
    run_task("corrupt", *overrides, "images.first=4", "store=whole")
    lines = (here / "whole" / "records.jsonl").read_bytes().splitlines(keepends=True)
    run_task("corrupt", *overrides, "images.first=2", "store=run")
    (here / "run" / "rank-0.jsonl").write_bytes(lines[3] + lines[2][:99])
    kept = records(here / "run")
    ended = run_main("corrupt", *overrides, "images.first=4", "store=run")
    assert (ended.code, ended.err, ended.error) == (0, "", None)
    assert "gaussian_blur, smoothed" in ended.out
    assert records(here / "run")[:2] == kept  # seconds included: not made again
    for name in ("records.jsonl", "fingerprint.json"):
        assert timeless(here / "run")[name] == timeless(here / "whole")[name]
    assert (here / "run" / "report.md").read_text() == (here / "whole" / "report.md").read_text()
    before = snapshot(here / "run")
    run_task("corrupt", *overrides, "images.first=4", "store=run")
    assert snapshot(here / "run") == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("corruptions=[fog]",), ("fog is not made here", "zoom_blur")),
        (("corruptions=zoom_blur",), ("corruptions must be a list",)),
        (("corruptions=[]",), ("corruptions must be a list",)),
        (("corruptions=[pixelate,pixelate]",), ("each once",)),
        (("severities=[0]",), ("from 1 to 5", "[0]")),
        (("severities=[1,6]",), ("from 1 to 5", "[1, 6]")),
        (("severities=[1.5]",), ("severities must be a list",)),
        (("n=0",), ("n must be a whole number",)),
        (("folder=nowhere",), ("nowhere/labels.npy is missing", "correct folder")),
        (("folder=CIFAR-10-C", "corruptions=[fog]"), ("not of the images that are visited", "data=cifar10")),
        (("folder=CIFAR-10-C",), ("defocus_blur.npy is missing", "choose corruptions from fog, zoom_blur")),
        (("checkpoint=null",), ("corrupt needs a trained network",)),
    ],
)
def test_bad_input_is_one_sentence(steps, change, words):
    cifar_c(steps)
    before = snapshot(steps)
    one_sentence(run_main("corrupt", *STEPS, "store=run", *change), *words)
    assert snapshot(steps) == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: layouts.cut(folder / "fog.npy"), ("fog.npy is damaged", "again")),
        (lambda folder: np.save(folder / "labels.npy", np.zeros(60, int)), ("not of the images that are visited",)),
        (lambda folder: np.save(folder / "fog.npy", np.zeros((60, 8, 8, 3), "u1")), ("fog.npy is damaged", "8x8x3")),
    ],
)
def test_a_damaged_folder_is_one_sentence(steps, monkeypatch, spoil, words):
    layouts.cifar(steps / "data", datasets.CIFAR10, monkeypatch)
    spoil(cifar_c(steps))
    overrides = ("data=cifar10", "folder=CIFAR-10-C", "corruptions=[fog]", "store=run")
    one_sentence(run_main("corrupt", *STEPS, *overrides), *words)
    assert not (steps / "run").exists()
