"""`gsmooth predict` on files of data sets that are not there: read, resized and named as the run's data set does it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra.utils import instantiate
from PIL import Image

import layouts
from conftest import QUIET, compose, one_sentence, records, run_main, run_task
from gsmooth_lightning.data import (
    GTSRB,
    Digits,
    FashionMNIST,
    ImageFolder,
    ImageNet,
    Kitti,
    RestrictedImageNet,
    SpeechCommands,
)
from test_predict_command import lines


@pytest.fixture
def untrained(here: Path):
    """Certifies with an untrained network; returns the store's folder."""

    def certify(*overrides: str) -> Path:
        network = instantiate(compose("certify", *overrides).model)
        torch.save(network.state_dict(), here / "network.ckpt")
        few = ("sampling.n0=32", "sampling.n=64", "images.in_flight=2")
        return run_task("certify", *QUIET, *few, *overrides, "checkpoint=network.ckpt", "store=run")

    return certify


COLOUR = ("data.channels=3", "error=none", "threat=l2", "transform=identity", "law=none", "preprocess=none")
COLOUR = (*COLOUR, "certify=direct", "noise.sigma=0.2", "model.mean=[0,0,0]", "model.std=[1,1,1]")


def test_a_folder_of_photographs_is_resized_as_the_data_set_does(untrained, here):
    """The certified inputs again, from files whose data set is gone: resized at the shorter side and cropped."""
    layouts.folders(here / "data", layouts.TEST_IMAGES, 11, 17)
    model = ("model=small_cnn", "model.size=8", "model.channels=3", "model.widths=[4,4]", "model.hidden=4")
    untrained(*layouts.OF_TREE, *(o for o in COLOUR if not o.startswith("model.")), *model)
    shutil.move(here / "data", here / "elsewhere")
    found = lines(run_main("predict", "run=run", "files=elsewhere"))
    assert [line["input"] for line in found] == [record["input"] for record in records(here / "run")]


@pytest.mark.parametrize(
    ("make", "dataset"),
    [
        (lambda root: layouts.folders(root, layouts.TREE, 9, 7), lambda root: ImageFolder(str(root), 5)),
        (lambda root: layouts.folders(root, layouts.TREE, 9, 7), lambda root: ImageFolder(str(root), 5, 6)),
        (lambda root: layouts.folders(root, layouts.TREE, 9, 7), lambda root: ImageFolder(str(root), None, 6)),
        (lambda root: layouts.folders(root, layouts.TREE, 9, 7), lambda root: ImageFolder(str(root), None)),
        (layouts.gtsrb, lambda root: GTSRB(str(root), 8)),
        (layouts.gtsrb, lambda root: GTSRB(str(root), None)),
        (lambda root: layouts.kitti(root, [["Car"]] * 5), lambda root: Kitti(str(root), [5, 12])),
    ],
)
def test_a_file_of_any_size_is_resized_as_the_data_set_does(tmp_path, make, dataset):
    """What `predict` does to a picture and what the data set's own split does to it, pixel by pixel."""
    make(tmp_path)
    own = dataset(tmp_path)
    picture = Image.fromarray(layouts.pixels(3, 13, 21))
    assert np.array_equal(own.shape(picture), own.split("test", 10).shape(picture))


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (Kitti("x"), ["Car", "Van"]),
        (FashionMNIST("x"), ["T-shirt/top", "Trouser"]),
        (ImageNet("x"), ["n01440764", "n01443537"]),
        (RestrictedImageNet("x"), ["dog", "cat"]),
        (SpeechCommands("x", ["yes", "no"]), ["yes", "no"]),
    ],
)
def test_names_of_the_first_classes(dataset, names):
    """In order of the labels, known without the files; of other data sets none are."""
    assert list(dataset.names)[:2] == names
    assert SpeechCommands("x").names is None
    assert Digits().names is None


WAVES = ("data=speech_commands_ten", "data.dataset.words=[yes,no]", "data.classes=2", "threat=volume")
WAVES = (*WAVES, "transform=volume", "law.sigma=3", "noise=none", "preprocess=none", "error=none", "certify=direct")
WAVES = (*WAVES, "model=mfcc_resnet", "block=4", "threat.low=-1", "threat.high=1")


def test_waveforms(untrained, here):
    """Clips of words, read and padded to a second as the data set does; a class has its word."""
    names = layouts.SPEAKERS[:4]
    lists = {"validation": [f"yes/{names[0]}_nohash_0.wav"], "testing": [f"yes/{names[1]}_nohash_0.wav"]}
    layouts.speech(here / "data", {"yes": names[:2], "no": names[2:]}, **lists)
    untrained(*WAVES)
    (certified,) = records(here / "run")
    shutil.move(here / "data", here / "elsewhere")
    found = lines(run_main("predict", "run=run", "files=elsewhere", "n=16"))
    (same,) = [line for line in found if line["file"].endswith(lists["testing"][0])]
    assert same["input"] == certified["input"]
    assert {line["class"] for line in found} <= {"yes", "no", None}
    assert same["class"] == ["yes", "no"][same["prediction"]]
    soundfile.write("fast.wav", np.zeros(8000, np.int16), 8000)
    one_sentence(run_main("predict", "run=run", "files=fast.wav", "n=16"), "fast.wav", "8000 Hz")
    one_sentence(run_main("predict", "run=run", "files=run"), "run holds no files that end in .wav")


def test_a_module_is_for_one_size(untrained, here):
    """Images that keep the size of their files are predicted, each alone, and make no module."""
    layouts.folders(here / "data", layouts.TEST_IMAGES, 9, 9)
    model = ("model=custom", f"model._target_={__name__}.AnySize")
    natural = ("data.dataset.size=null", "backend=plain", "images.first=1")
    untrained(*layouts.OF_TREE, *(o for o in COLOUR if not o.startswith("model.")), *model, *natural)
    layouts.picture(here / "own" / "a.png", 1, 12, 7)
    layouts.picture(here / "own" / "b.png", 2, 9, 9)
    layouts.picture(here / "own" / "c.png", 3, 2, 2)
    ended = run_main("predict", "run=run", "files=own", "n=64")
    one_sentence(ended, "1 of 3 files have no prediction; own/c.png: the network fails on inputs of shape (3, 2, 2)")
    assert [line.get("n") for line in lines(ended, errors=1)] == [64, 64, None]
    one_sentence(run_main("predict", "run=run", "export=own.pt2"), "a module is for one size")


class AnySize(torch.nn.Module):
    """Two classes by the mean of a convolution without padding, of images with 3 pixels a side or more."""

    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x).mean((2, 3))
