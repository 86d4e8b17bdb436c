"""The network may compute votes in half precision: it is then another network, and the certificate says so."""

import json
from pathlib import Path

import pytest
import torch
from lightning_fabric.accelerators import MPSAccelerator
from pytorch_lightning import Trainer
from torch import nn

from conftest import SMALL, compose, one_sentence, records, run_main, run_task
from gsmooth_lightning.certify import AdditiveCertifier, FixedN
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model import described, fused
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.tasks.setup import make_trainer
from gsmooth_lightning.threat import PixelThreat


def linear(*weights: float) -> nn.Module:
    """Logits (0, w . x) of images with two pixels."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[0.0, 0.0], list(weights)]))
        network[1].bias.zero_()
    return network


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["plain", "fx"])
def test_inputs_and_weights_are_rounded_and_logits_are_float32(dtype: torch.dtype, backend: str) -> None:
    """w . x with a weight and an input between two numbers of the precision."""
    network = linear(1 + 2**-12, 1.0)
    x = torch.tensor([1 + 2**-12, 0.5]).view(1, 1, 1, 2).expand(4, 1, 1, 2)
    fast, used = fused(network, x, backend, dtype)
    rounded = [torch.tensor(v, dtype=dtype).item() for v in (1 + 2**-12, 1 + 2**-12)]
    assert rounded == [1.0, 1.0]
    logits = fast(x)
    assert logits.dtype == torch.float32
    assert logits[0, 1].item() == 1.5
    assert network(x)[0, 1].item() != 1.5
    assert used == backend
    assert described(fast) == f"{backend} {str(dtype).removeprefix('torch.')}"


def test_a_certificate_names_the_form_and_precision_of_its_network() -> None:
    smoothed = SmoothedClassifier(linear(1.0, 1.0).eval(), classes=2, noise=Gaussian(0.5))
    certifier = AdditiveCertifier(FixedN(n0=8, n=64))
    ((_, certificate),) = certifier.certify(smoothed, PixelThreat(), [(0, torch.ones(1, 1, 2))])
    assert certificate.details["network"] == "plain float32"


def test_a_run_in_half_precision_is_another_run(checkpoint: Path, tmp_path: Path) -> None:
    line = (*SMALL, f"checkpoint={checkpoint}", "images.first=2", f"store={tmp_path / 'run'}")
    folder = run_task("certify", *line, "dtype=bfloat16")
    assert {r["details"]["network"] for r in records(folder)} == {"fx bfloat16"}
    assert json.loads((folder / "fingerprint.json").read_text())["backend"] == "fx bfloat16"
    one_sentence(run_main("certify", *line), "another run", "backend")
    one_sentence(run_main("certify", *line, "dtype=int8"), "float32, float16 or bfloat16", "int8")


def test_an_apple_gpu_is_left_alone(monkeypatch) -> None:
    """It has no float64, in which noise is drawn; Lightning would choose it."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    assert Trainer(logger=False, enable_checkpointing=False).strategy.root_device.type == "mps"
    assert make_trainer(compose("certify")).strategy.root_device.type == "cpu"
    with pytest.raises(RequestError, match="trainer=cpu"):
        make_trainer(compose("certify", "trainer.accelerator=mps"))
