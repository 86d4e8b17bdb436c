"""Weights from files: this package's, other authors', and what must not load."""

import argparse
import pickle
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import ClassifierModule
from gsmooth_lightning.model import MFCCNet, SmallCNN, cifar_resnet, load_weights, timm_model, torchvision_model
from gsmooth_lightning.model.pretrained import normalized
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.threat import PixelThreat
from gsmooth_lightning.train import NoiseAugmentation
from test_model import trained_looking

CIFAR = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# -------------------------------------------------- the authors' networks, as they wrote them


class TheirNormalisation(nn.Module):
    """Cohen's: plain tensors, so that nothing of it is in a state dict. SmoothAdv's has no deviations."""

    def __init__(self, means, sds=(1.0, 1.0, 1.0)):
        super().__init__()
        self.means, self.sds = torch.tensor(means), torch.tensor(sds)

    def forward(self, x):
        return (x - self.means[:, None, None]) / self.sds[:, None, None]


class BufferedNormalisation(nn.Module):
    """One that saves its statistics."""

    def __init__(self, means, sds):
        super().__init__()
        self.register_buffer("means", torch.tensor(means))
        self.register_buffer("sds", torch.tensor(sds))

    def forward(self, x):
        return (x - self.means[:, None, None]) / self.sds[:, None, None]


class TheirBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + shortcut)


class TheirResNet(nn.Module):
    """bearpaw's network for CIFAR, which Cohen, Salman and (with a pooling of stride 1) Zhai use."""

    def __init__(self, depth=20, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = []
            for index in range((depth - 2) // 6):
                downsample, stride = None, 1
                if index == 0 and inputs != outputs:
                    stride = 2
                    downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))
                blocks.append(TheirBlock(inputs if index == 0 else outputs, outputs, stride, downsample))
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


# -------------------------------------------------- helpers


def saved(folder: Path, content, **options) -> Path:
    path = folder / "weights.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(content, path, **options)
    return path


def assert_same_logits(source, target, shape=(4, 3, 32, 32), seed=0):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        expected, found = source.eval()(x), target.eval()(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def cohen(network, arch="cifar_resnet20"):
    """What Cohen's and SmoothAdv's train.py write."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)  # .1 blows 110 layers up
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {"epoch": 90, "arch": arch, "state_dict": network.state_dict(), "optimizer": optimizer.state_dict()}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def small():
    """A small network that differs from a fresh one."""
    torch.manual_seed(1)
    return trained_looking(SmallCNN(channels=3, size=16, widths=(4, 4), hidden=8))


def fresh():
    return SmallCNN(channels=3, size=16, widths=(4, 4), hidden=8)


SMALL_SHAPE = (4, 3, 16, 16)


# -------------------------------------------------- layouts


@pytest.mark.parametrize("depth", [20, 110])
def test_cohen_cifar(tmp_path, depth):
    """Keys such as 1.conv1.weight and 1.layer2.0.downsample.0.weight, the optimizer beside them."""
    source = trained_looking(nn.Sequential(TheirNormalisation(*CIFAR), TheirResNet(depth)))
    content = cohen(source, f"cifar_resnet{depth}")
    assert {"1.conv1.weight", "1.layer2.0.downsample.0.weight", "1.layer1.2.bn2.running_var"} <= set(
        content["state_dict"]
    )
    target = cifar_resnet(depth, 3, 10, *CIFAR)
    load_weights(target, saved(tmp_path, content))
    assert_same_logits(source, target)


def test_cohen_imagenet(tmp_path):
    """Keys such as 1.module.layer1.0.conv1.weight; with ResNet-18 for ResNet-50."""
    source = trained_looking(nn.Sequential(TheirNormalisation(*IMAGENET), nn.DataParallel(resnet18(num_classes=7))))
    content = cohen(source, "resnet50")
    assert "1.module.layer1.0.conv1.weight" in content["state_dict"]
    target = torchvision_model("resnet18", 3, 7, *IMAGENET)
    load_weights(target, saved(tmp_path, content))
    assert_same_logits(source, target, (2, 3, 64, 64))


def test_smoothadv_subtracts_a_mean_and_divides_by_nothing(tmp_path):
    """model.std=[1,1,1], whole numbers as a shell gives them; with Cohen's deviations it is another function."""
    source = trained_looking(nn.Sequential(TheirNormalisation(CIFAR[0]), TheirResNet()))
    path = saved(tmp_path, cohen(source))
    target = cifar_resnet(20, 3, 10, CIFAR[0], [1, 1, 1])
    load_weights(target, path)
    assert_same_logits(source, target)
    other = cifar_resnet(20, 3, 10, *CIFAR)
    load_weights(other, path)
    with pytest.raises(AssertionError):
        assert_same_logits(source, other)


def test_macer_has_no_normalisation(tmp_path):
    """model.mean=[0,0,0] model.std=[1,1,1]."""
    source = trained_looking(TheirResNet())
    target = cifar_resnet(20, 3, 10, [0, 0, 0], [1, 1, 1])
    load_weights(target, saved(tmp_path, {"net": source.state_dict(), "epoch": 440}))
    assert_same_logits(source, target)


@pytest.mark.parametrize("holder", [None, "state_dict", "net", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "1.", "module.1.", "1.module.", "smoothed.base."])
@pytest.mark.parametrize("behind", [False, True])
def test_every_prefix_in_every_holder(tmp_path, small, holder, prefix, behind):
    """Into the network itself and into one behind a normalisation."""
    state = prefixed(small.state_dict(), prefix)
    target = normalized(fresh(), [0.0] * 3, [1.0] * 3) if behind else fresh()
    load_weights(target, saved(tmp_path, state if holder is None else {"epoch": 1, holder: state}))
    assert_same_logits(small, target, SMALL_SHAPE)


@pytest.mark.parametrize("wrapped", [False, True])
def test_keys_of_the_whole_sequence(tmp_path, small, wrapped):
    """A state dict of this package's own sequence, and of its data-parallel wrapper."""
    source = normalized(small, *CIFAR)
    path = saved(tmp_path, (nn.DataParallel(source) if wrapped else source).state_dict())
    target = normalized(fresh(), *CIFAR)
    load_weights(target, path)
    assert_same_logits(source, target, SMALL_SHAPE)


def lightning_module(network, optimizer=torch.optim.SGD):
    smoothed = SmoothedClassifier(network, 10, noise=Gaussian(0.25))
    return ClassifierModule(smoothed, PixelThreat(), NoiseAugmentation(), optimizer)


@pytest.mark.parametrize("behind", [False, True])
def test_lightning_checkpoints(tmp_path, small, behind):
    """Names as ClassifierModule gives them, the buffers of other parts left out."""
    source = normalized(small, *CIFAR) if behind else small
    state = lightning_module(source).state_dict()
    assert all(key.startswith("smoothed.base.") for key in state)
    state["objective.weight"] = torch.ones(3)
    content = {"epoch": 3, "state_dict": state, "optimizer_states": [], "callbacks": {}, "hparams": None}
    target = normalized(fresh(), *CIFAR) if behind else fresh()
    load_weights(target, saved(tmp_path, content))
    assert_same_logits(source, target, SMALL_SHAPE)


def test_averaged_checkpoints_load_the_average(tmp_path):
    """EMAWeightAveraging saves the average as state_dict and the last weights beside it, while a training runs."""
    torch.manual_seed(0)
    rows = [(torch.rand(3, 16, 16), i % 10, i) for i in range(24)]
    keep = ModelCheckpoint(dirpath=tmp_path, filename="resume", save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=0.9), keep],
    )
    module = lightning_module(fresh(), partial(torch.optim.SGD, lr=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(rows, batch_size=6))
    content = torch.load(tmp_path / "resume.ckpt", weights_only=True)
    assert {"current_model_state", "averaging_state", "optimizer_states", "callbacks"} <= set(content)
    target = fresh()
    load_weights(target, tmp_path / "resume.ckpt")
    for key, value in target.state_dict().items():
        assert torch.equal(value, content["state_dict"][f"smoothed.base.{key}"])
    assert not torch.equal(target.head[1].weight, content["current_model_state"]["smoothed.base.head.1.weight"])


@pytest.mark.parametrize("names", [("means", "sds"), ("mean", "std")])
@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)])
def test_saved_statistics_must_be_the_networks_own(tmp_path, small, names, shape):
    source = nn.Sequential(BufferedNormalisation(*CIFAR), small)
    state = dict(source.state_dict())
    for theirs, name in zip(("means", "sds"), names, strict=True):
        state[f"0.{name}"] = state.pop(f"0.{theirs}").view(shape)
    path = saved(tmp_path, {"state_dict": state})
    target = normalized(fresh(), *CIFAR)
    load_weights(target, path)
    assert_same_logits(source, target, SMALL_SHAPE)
    before = {key: value.clone() for key, value in fresh().state_dict().items()}
    for mean, std in [(CIFAR[0], IMAGENET[1]), (IMAGENET[0], CIFAR[1])]:
        other = normalized(fresh(), mean, std)
        other[1].load_state_dict(before)
        with pytest.raises(RequestError, match=r"another normalisation: 0\.\w+ is \[0\.\d+, .*model\.mean"):
            load_weights(other, path)
        assert all(torch.equal(value, before[key]) for key, value in other[1].state_dict().items())


def test_saved_statistics_equal_to_whole_numbers(tmp_path, small):
    source = nn.Sequential(BufferedNormalisation([0.0] * 3, [1.0] * 3), small)
    target = normalized(fresh(), [0, 0, 0], [1, 1, 1])
    load_weights(target, saved(tmp_path, source.state_dict()))
    assert_same_logits(source, target, SMALL_SHAPE)


def test_files_of_old_torch(tmp_path):
    """Not zip archives, as the authors' of 2019 are."""
    source = trained_looking(nn.Sequential(TheirNormalisation(*CIFAR), TheirResNet()))
    path = saved(tmp_path, cohen(source), _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"
    target = cifar_resnet(20, 3, 10, *CIFAR)
    load_weights(target, path)
    assert_same_logits(source, target)


def test_half_precision_weights_load_as_they_are(tmp_path, small):
    state = {key: value.half() if value.is_floating_point() else value for key, value in small.state_dict().items()}
    target = fresh()
    load_weights(target, saved(tmp_path, state))
    for key, value in target.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype))
        assert value.dtype == small.state_dict()[key].dtype


def test_audio_and_timm_networks_round_trip(tmp_path):
    """Their own state dicts, the first with torchaudio's filters in it."""
    source = trained_looking(MFCCNet(classes=4))
    target = MFCCNet(classes=4)
    load_weights(target, saved(tmp_path, lightning_module(source).state_dict()))
    assert_same_logits(source, target, (2, 1, 4000))
    source = trained_looking(timm_model("resnet10t", 3, 4, *IMAGENET))
    target = timm_model("resnet10t", 3, 4, *IMAGENET)
    load_weights(target, saved(tmp_path, {"state_dict": source[1].state_dict(), "arch": "resnet10t"}))
    assert_same_logits(source, target, (2, 3, 64, 64))


# -------------------------------------------------- networks with awkward names


def two_linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))


def one_linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def nested():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Flatten(), nn.Linear(18, 3)))


class Named(nn.Module):
    """A layer whose name is a wrapper's."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(12, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.module(x.flatten(1)))


class Statistics(nn.Module):
    """Weights whose names are a normalisation's."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(3))
        self.std = nn.Linear(12, 3)

    def forward(self, x):
        return self.std(x.flatten(1)) - self.mean


@pytest.mark.parametrize(
    ("make", "place", "behind"),
    [
        *((make, "", False) for make in (two_linear, one_linear, nested, Statistics)),
        *((make, "module.", False) for make in (two_linear, one_linear, nested, Statistics)),
        (two_linear, "1.", False),
        (two_linear, "", True),
        (two_linear, "1.module.", True),
        (one_linear, "1.", True),
        (nested, "1.", True),
        (Statistics, "", True),
        (Statistics, "1.", False),
        (one_linear, "1.", False),
        (one_linear, "", True),
        (nested, "1.", False),
        (nested, "", True),
        (Named, "", False),
        (Named, "module.", False),
        (Named, "1.", True),
        (Named, "", True),
    ],
)
def test_networks_with_awkward_names(tmp_path, make, place, behind):
    """Names that are numbers, `module` or statistics; from the bare network or a sequence, into either."""
    torch.manual_seed(2)
    source = make()
    target = normalized(make(), [0.0] * 3, [1.0] * 3) if behind else make()
    load_weights(target, saved(tmp_path, prefixed(source.state_dict(), place)))
    assert_same_logits(source, target, (4, 3, 2, 2))


@pytest.mark.parametrize(
    "place",
    [
        "1.1.",
        "smoothed.base.1.1.",
        "1.module.1.",
        "",
        "module.",
        "1.",
        "1.module.",
    ],
)
def test_grey_networks_of_torchvision(tmp_path, place):
    """The network stands in second place of a sequence in second place of a sequence."""
    source = trained_looking(torchvision_model("resnet18", 1, 5, [0.2], [0.5]))
    state = prefixed(source[1][1].state_dict(), place)
    target = torchvision_model("resnet18", 1, 5, [0.2], [0.5])
    load_weights(target, saved(tmp_path, {"state_dict": state}))
    assert_same_logits(source, target, (2, 1, 64, 64))


# -------------------------------------------------- what does not load


def refusal(network, path) -> str:
    """The sentence with which a file is refused; the network keeps its weights."""
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(RequestError) as caught:
        load_weights(network, path)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def test_a_mismatch_names_the_first_keys_and_the_arch(tmp_path):
    source = nn.Sequential(TheirNormalisation(*CIFAR), TheirResNet(26))
    message = refusal(cifar_resnet(20, 3, 10, *CIFAR), saved(tmp_path, cohen(source, "cifar_resnet26")))
    assert "unknown 1.layer1.3.conv1.weight, 1.layer1.3.bn1.weight, 1.layer1.3.bn1.bias ..." in message
    assert "'cifar_resnet26'" in message
    message = refusal(
        cifar_resnet(26, 3, 10, *CIFAR), saved(tmp_path, {"state_dict": prefixed(TheirResNet().state_dict(), "1.")})
    )
    assert "lacks 1.layer1.3.conv1.weight, " in message
    assert "arch" not in message
    message = refusal(cifar_resnet(20, 3, 100, *CIFAR), saved(tmp_path, {"net": TheirResNet().state_dict()}))
    assert "other shapes for 1.fc.weight, 1.fc.bias;" in message
    message = refusal(SmallCNN(), saved(tmp_path, {"foo": torch.zeros(1)}))
    assert "lacks features.0.weight" in message
    assert "has unknown foo;" in message
    message = refusal(SmallCNN(), saved(tmp_path, SmallCNN(widths=(8, 8)).state_dict()))
    assert "other shapes for features.0.weight" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, small, value):
    state = small.state_dict()
    state["features.1.running_var"][2] = value
    assert "NaN or infinite weights in features.1.running_var" in refusal(fresh(), saved(tmp_path, {"net": state}))


def test_weights_that_single_precision_cannot_hold_are_refused(tmp_path, small):
    """1e300 is finite in float64 and infinite in the network."""
    state = {key: value.double() if value.is_floating_point() else value for key, value in small.state_dict().items()}
    load_weights(fresh(), saved(tmp_path, state))
    state["features.1.bias"][1] = 1e300
    assert "NaN or infinite weights in features.1.bias" in refusal(fresh(), saved(tmp_path, state))


def test_quantised_weights_are_refused(tmp_path, small):
    """Whole numbers without their scale are other weights."""
    state = small.state_dict()
    state["features.0.weight"] = (100 * state["features.0.weight"]).to(torch.int8)
    message = refusal(fresh(), saved(tmp_path, state))
    assert "torch.int8 for features.0.weight; save the weights as floating point" in message


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("layout", ["zip", "old", "pickle"])
def test_pickled_code_is_never_executed(tmp_path, small, layout):
    sprung, path = tmp_path / "sprung", tmp_path / "weights.pth"
    content = {"state_dict": small.state_dict(), "extra": Trap(sprung)}
    if layout == "pickle":
        path.write_bytes(pickle.dumps({"extra": Trap(sprung)}))
    else:
        saved(tmp_path, content, _use_new_zipfile_serialization=layout == "zip")
    assert "weights_only" in refusal(fresh(), path)
    assert not sprung.exists()
    if layout != "pickle":
        torch.load(path, weights_only=False)
        assert sprung.exists(), "the trap works"


@pytest.mark.parametrize(
    "extra",
    [np.float64(0.9), np.int64(3), argparse.Namespace(lr=0.1), SmallCNN(), Path("x"), np.zeros(2)],
    ids=lambda extra: type(extra).__name__,
)
def test_objects_beside_the_weights_give_one_sentence(tmp_path, small, extra):
    path = saved(tmp_path, {"state_dict": small.state_dict(), "best": extra})
    assert "save a state dict" in refusal(fresh(), path)


@pytest.mark.parametrize(
    "content",
    [None, 3, [torch.zeros(2)], torch.zeros(2), {}, {"epoch": 3}, {"state_dict": {}}, {"net": {"a": {"b": 1}}}],
    ids=str,
)
def test_files_without_a_state_dict_give_one_sentence(tmp_path, content):
    assert "no state dict" in refusal(fresh(), saved(tmp_path, content))


@pytest.mark.parametrize("content", [b"", b"PK", b"not a checkpoint", b"\x80\x02", b"\0" * 1000])
def test_foreign_bytes_give_one_sentence(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert "is not a checkpoint" in refusal(fresh(), path)


def test_a_missing_file_or_a_folder_gives_one_sentence(tmp_path):
    assert "there is no checkpoint" in refusal(fresh(), tmp_path / "nowhere.pth")
    assert "there is no checkpoint" in refusal(fresh(), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({0: torch.zeros(2), 1: torch.zeros(3)}, id="numbers for names"),
        pytest.param({"weight": torch.eye(2).to_sparse(), "bias": torch.zeros(2)}, id="sparse"),
        pytest.param({"weight": torch.empty(2, 2, device="meta"), "bias": torch.zeros(2)}, id="meta"),
        pytest.param({"state_dict": {"foo": torch.zeros(1)}, "arch": torch.zeros(2)}, id="arch"),
        pytest.param({"weight": torch.full((2, 2), complex("nan")), "bias": torch.zeros(2)}, id="complex"),
    ],
)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_odd_contents_give_one_sentence(tmp_path, content):
    refusal(nn.Linear(2, 2), saved(tmp_path, content))


def test_two_weights_for_one_name_are_refused(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    refusal(nn.Linear(2, 2), saved(tmp_path, state | {"module.weight": torch.ones(2, 2)}))
