"""A classifier that is seen through its labels alone: what it may answer, its certificates, and what is refused."""

import dataclasses
import functools
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from conftest import QUIET, compose, one_sentence, records, run_main, run_task, snapshot
from gsmooth_lightning.attack import eot, worst_of_k
from gsmooth_lightning.certify import AdditiveCertifier
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model import BlackBox, SmallCNN, dncnn, fused, is_black_box
from gsmooth_lightning.plans import FixedN, GroupSequential
from gsmooth_lightning.report.tables import BLACK_BOX, certificate_rows
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.tasks.setup import data_module, own_code
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.train import CertifiedArea
from gsmooth_lightning.transform import Rotation
from plans import finish

CLASSES, BLOCK = 10, 16
L2 = PixelThreat()


def rows(x: Tensor) -> list[int]:
    """A classifier by hand: ten times the mean of the image."""
    return (x.mean((1, 2, 3)) * 10).long().clamp(0, 9).tolist()


@functools.cache
def network() -> nn.Module:
    """Untrained, but its answers differ from image to image."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, CLASSES)).eval()
    with torch.no_grad():
        made[1].weight.mul_(4)
    return made


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(1)) / 255


AS = {
    "list": lambda labels: labels.tolist(),
    "tuple": lambda labels: tuple(labels.tolist()),
    "numpy": lambda labels: labels.numpy().copy(),
    "numpy bytes": lambda labels: labels.numpy().astype(np.uint8),
    "numpy numbers": lambda labels: list(labels.numpy()),
    "tensor": lambda labels: labels,
    "int32 tensor": lambda labels: labels.int(),
}


def boxed(kind: str, asked: list | None = None) -> BlackBox:
    """The network behind its labels, in one of the forms."""

    def function(x: Tensor):
        if asked is not None:
            asked.append((tuple(x.shape), x.dtype, x.device.type, x.requires_grad))
        return AS[kind](network()(x).argmax(1))

    return BlackBox(function)


def smoothed(base: nn.Module, **options) -> SmoothedClassifier:
    return SmoothedClassifier(base, CLASSES, noise=Gaussian(0.1), block=BLOCK, **options).eval()


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", AS)
def test_labels_come_in_many_forms(kind):
    """Out come int64 labels, the network's own; the function sees plain float32 images on the CPU."""
    asked, x = [], images(7).requires_grad_()
    with torch.no_grad():
        expected = network()(x).argmax(1)
    labels = boxed(kind, asked)(x)
    assert labels.dtype == torch.int64
    assert torch.equal(labels, expected)
    assert len(expected.unique()) > 2
    assert asked == [((7, 1, 8, 8), torch.float32, "cpu", False)]


WRONG = {
    "floats": (lambda x: torch.ones(len(x)), "not torch.float32 of shape (4,)"),
    "a list of floats": (lambda x: [1.0] * len(x), "not torch.float32 of shape (4,)"),
    "truth values": (lambda x: x.mean((1, 2, 3)) > 0.5, "not torch.bool of shape (4,)"),
    "complex numbers": (lambda x: torch.ones(len(x), dtype=torch.complex64), "not torch.complex64"),
    "too few": (
        lambda x: rows(x)[:-1],
        "must return 4 whole numbers for as many inputs",
    ),
    "logits": (lambda x: torch.ones(len(x), 10).long(), "of shape (4, 10)"),
    "a column": (lambda x: torch.ones(len(x), 1).long(), "of shape (4, 1)"),
    "one number": (lambda x: 3, "of shape ()"),
    "words": (lambda x: ["cat"] * len(x), "fails on a block of (4, 1, 8, 8)"),
    "ragged lists": (lambda x: [[1], [1, 2], [1], [1]], "fails on a block of (4, 1, 8, 8)"),
    "a TypeError": (lambda x: x + "one", "fails on a block of (4, 1, 8, 8)"),
    "a ValueError": (lambda x: int("one"), "invalid literal for int() with base 10: 'one'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_answers_are_refused(case):
    function, words = WRONG[case]
    with pytest.raises(RequestError) as refused:
        BlackBox(function)(images(4))
    assert words in str(refused.value)
    assert str(refused.value).startswith("the black box ")


def offline(x: Tensor):
    raise ConnectionError("no route to host")


@pytest.mark.parametrize("function", [lambda x: None, lambda x: {"labels": rows(x)}, offline])
def test_a_forgotten_return_and_a_lost_connection_are_sentences(function):
    with pytest.raises(RequestError, match="the black box"):
        BlackBox(function)(images(4))


def test_something_that_is_no_function_is_refused():
    with pytest.raises(RequestError, match="function must be a Python function of a block of inputs"):
        BlackBox(rows(images(3)))


def test_there_is_nothing_to_save_or_train():
    box = BlackBox(rows)
    assert not box.state_dict()
    assert not list(box.parameters())
    assert is_black_box(box)
    assert is_black_box(nn.Sequential(dncnn(1, 3, 2), box))
    assert not is_black_box(nn.Sequential(dncnn(1, 3, 2), network()))


# ---------------------------------------------------------------- certificates


def certificates(base: nn.Module, plan, n: int = 3) -> list:
    found = AdditiveCertifier(plan).certify(smoothed(base), L2, list(enumerate(images(n))), seed=5)
    return [dataclasses.replace(certificate, seconds=0.0) for _, certificate in sorted(found, key=lambda item: item[0])]


PLANS = {"fixed": FixedN(32, 300), "sequential": GroupSequential([0.05, 0.1, 0.15], 32, 300)}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["list", "numpy bytes", "tensor"])
def test_certificates_are_those_of_the_network_itself(kind, plan):
    """Every number; the details say what the base is. Every block that the function sees is whole."""
    asked: list = []
    direct, found = certificates(network(), PLANS[plan]), certificates(boxed(kind, asked), PLANS[plan])
    assert any(certificate.radius > 0 for certificate in direct)
    assert all(sum(certificate.counts) == certificate.n for certificate in found)
    for own, certificate in zip(direct, found, strict=True):
        assert "base" not in own.details
        assert certificate.details["base"] == "black box"
        assert certificate == dataclasses.replace(own, details=own.details | {"base": "black box"})
    assert {shape for shape, *_ in asked} == {(BLOCK, 1, 8, 8)}


def test_certificates_with_a_denoiser_are_those_of_the_denoised_network():
    """f(D(x + eps)) through labels, and with logits; another classifier than without it."""
    torch.manual_seed(2)
    denoiser = dncnn(1, 3, 4).eval().requires_grad_(False)
    direct = certificates(nn.Sequential(denoiser, network()).eval(), FixedN(32, 300))
    found = certificates(nn.Sequential(denoiser, boxed("list")).eval(), FixedN(32, 300))
    assert [c.counts for c in found] == [c.counts for c in direct]
    assert [c.radius for c in found] == [c.radius for c in direct]
    assert all(c.details["base"] == "black box" for c in found)
    assert [c.counts for c in found] != [c.counts for c in certificates(network(), FixedN(32, 300))]


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_that_are_no_classes_end_the_run(label):
    """Without a certificate: they are counted as failures, and never as another class."""
    with pytest.raises(RequestError, match="on 32 of 32 draws of image 0"):
        certificates(BlackBox(lambda x: [label] * len(x)), FixedN(32, 300))


def test_labels_that_are_no_classes_are_named_so():
    with pytest.raises(RequestError) as refused:
        certificates(BlackBox(lambda x: [CLASSES] * len(x)), FixedN(32, 300))
    assert "checkpoint" not in str(refused.value)


def test_the_report_says_so():
    """A row, if any certificate is of a black box; none otherwise."""
    for base, said in ((boxed("list"), True), (network(), False)):
        found = [
            {"index": i, "label": 0, "base": 0, **dataclasses.asdict(certificate)}
            for i, certificate in enumerate(certificates(base, FixedN(32, 300)))
        ]
        table = certificate_rows(json.loads(json.dumps(found)), L2, "three", "random images")
        assert (table.get("base classifier") == BLACK_BOX) is said
    assert "labels alone" in BLACK_BOX


# ---------------------------------------------------------------- a function of its one input


class InTurn:
    """Answers that depend on how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: Tensor) -> list[int]:
        self.calls += 1
        return [(label + self.calls) % CLASSES for label in rows(x)]


def compared(x: Tensor) -> Tensor:
    """Whether an image is brighter than the mean of its block."""
    return (x.mean((1, 2, 3)) > x.mean()).long()


def ranks(x: Tensor) -> Tensor:
    """The place of an image in its block, by brightness."""
    return x.mean((1, 2, 3)).argsort().argsort() % CLASSES


@pytest.mark.parametrize("function", [InTurn(), compared, ranks])
def test_chance_and_the_rest_of_the_block_are_refused(function):
    """By `check_function`, which every certificate starts with."""
    with pytest.raises(RequestError, match="depends on the rest of its batch or on chance"):
        smoothed(BlackBox(function)).check_function(images(1)[0])
    with pytest.raises(RequestError, match="depends on the rest of its batch or on chance"):
        certificates(BlackBox(function), FixedN(32, 300))


def place(x: Tensor) -> Tensor:
    """Answers that depend on the place in the block."""
    return torch.arange(len(x)) % CLASSES


class Flicker:
    """One of two neighbours among 20,000 classes, in turn."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x: Tensor) -> list[int]:
        self.calls += 1
        return [20_000 + self.calls % 2] * len(x)


class FarOff(InTurn):
    """Other answers each time; the first is far from any class."""

    def __call__(self, x: Tensor) -> list[int]:
        return [10**6, *super().__call__(x)[1:]]


@pytest.mark.parametrize("function", [place, Flicker(), FarOff()])
def test_labels_are_compared_exactly_and_in_other_places(function):
    found = SmoothedClassifier(BlackBox(function), 30_000, noise=Gaussian(0.25), block=BLOCK).eval()
    with pytest.raises(RequestError, match="depends on the rest of its batch or on chance"):
        found.check_function(images(1)[0])


def darkened(x: Tensor) -> list[int]:
    """Writes into the block that it was given."""
    x -= 0.25
    return rows(x)


def test_what_the_function_does_to_its_block_stays_there():
    x = images(4)
    before = x.clone()
    BlackBox(darkened)(x)
    assert torch.equal(x, before)


# ---------------------------------------------------------------- the copy that is certified


class NoCopies:
    """A service: it cannot be copied."""

    def __call__(self, x: Tensor) -> list[int]:
        return rows(x)

    def __deepcopy__(self, memo):
        raise AssertionError("a black box was copied")

    __copy__ = __reduce_ex__ = __deepcopy__


@pytest.mark.parametrize("backend", ["auto", "compile", "fx", "plain"])
def test_the_black_box_stays_as_it_is(backend):
    """Whatever is asked for: there is nothing to optimise."""
    box = BlackBox(NoCopies())
    found, used = fused(box, images(8), backend)
    assert found is box
    assert used == "plain"


@pytest.mark.parametrize("backend", ["fx", "plain"])
def test_its_denoiser_is_optimised(backend):
    """A copy of the denoiser, the same images to 1e-4, before the very black box; never copied."""
    torch.manual_seed(2)
    denoiser, box = dncnn(1, 4, 4).eval(), BlackBox(NoCopies())
    with torch.no_grad():
        for layer in denoiser.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.2, 0.2), layer.running_var.uniform_(0.5, 2)
    x = images(8)
    found, used = fused(nn.Sequential(denoiser, box).eval(), x, backend)
    assert used == backend
    assert is_black_box(found)
    first, second = found
    assert second is box
    assert first is not denoiser
    with torch.no_grad():
        torch.testing.assert_close(first(x), denoiser(x), atol=1e-4, rtol=0)
        assert found(x).tolist() == rows(first(x))
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in first.modules()) == (backend == "plain")


def test_a_denoiser_is_part_of_any_optimised_network():
    """Not of black boxes alone: D and f are folded together, and f alone answers otherwise."""
    torch.manual_seed(3)
    denoiser = dncnn(1, 3, 4)
    with torch.no_grad():
        denoiser.layers[-1].bias.fill_(-2.0)  # far off
    classifier = SmallCNN(1, 28, 10, [4], 8).eval()
    both, x = nn.Sequential(denoiser, classifier).eval(), torch.rand(4, 1, 28, 28)
    found, _ = fused(both, x, "fx")
    with torch.no_grad():
        torch.testing.assert_close(found(x), both(x), atol=1e-4, rtol=1e-4)
        assert (found(x) - classifier(x)).abs().max() > 0.01


class Backwards(nn.Module):
    """Turns labels around."""

    def forward(self, labels: Tensor) -> Tensor:
        return 9 - labels


class Around(nn.Sequential):
    """A sequence whose forward does more than its parts."""

    def forward(self, x: Tensor) -> Tensor:
        return 9 - super().forward(x)


OWN = {
    "three parts": lambda: nn.Sequential(nn.Identity(), BlackBox(rows), Backwards()),
    "a class of its own": lambda: Around(nn.Identity(), BlackBox(rows)),
    "one part": lambda: nn.Sequential(BlackBox(rows)),
}


@pytest.mark.parametrize("case", OWN)
def test_a_users_own_sequence_with_a_black_box_is_what_is_certified(case):
    """Nothing of it may be lost."""
    base, x = OWN[case]().eval(), images(8)
    for backend in ("plain", "auto"):
        found, _ = fused(base, x, backend)
        assert torch.equal(found(x), base(x))


# ---------------------------------------------------------------- what needs more than labels


def test_soft_votes_areas_and_gradient_attacks_need_logits():
    found, x = smoothed(BlackBox(rows), votes="soft"), images(1)
    with pytest.raises(RequestError, match="votes=hard"):
        found.soft_votes(images(BLOCK))
    with pytest.raises(RequestError, match="labels"):
        CertifiedArea(4)(found, L2, x, torch.zeros(1))
    threat = TransformationThreat(Rotation(), -10, 10)
    for base in (BlackBox(rows), nn.Sequential(dncnn(1, 3, 2), BlackBox(rows)).eval()):
        turned = SmoothedClassifier(base, CLASSES, Rotation(), None, Gaussian(10.0), Gaussian(0.2), BLOCK).eval()
        with pytest.raises(RequestError, match="or returns labels"):
            finish(eot(turned, threat, x[0], 0, Stream(0, 0), restarts=4, steps=1, draws=2, n=16))
        attacked = finish(worst_of_k(turned, threat, x[0], 0, Stream(0, 0), k=4, n=16))
        assert len(attacked.smoothed) == 4


# ---------------------------------------------------------------- commands

CERTIFY = (*QUIET, "data.size=8", "data.enlarge=null", "threat=l2", "transform=identity", "preprocess=none", "law=none")
CERTIFY = (*CERTIFY, "noise.sigma=0.3", "error=none", "certify=direct", "images.first=2", "sampling.n0=64")
CERTIFY = (*CERTIFY, "sampling.n=200", "model=black_box")
OURS = f"model.function.path={__name__}.rows"
SOURCE = "def answer(x):\n    return (x.mean((1, 2, 3)) * 10).long().clamp(0, 9)\n"
PARTIAL = "import functools\ndef f(x, s):\n    return (x.mean((1, 2, 3)) * s).long()\n"
PARTIAL += "answer = functools.partial(f, s=10)\n"


@pytest.fixture
def service(here, monkeypatch):
    """Writes the module `service` in the current folder, and imports it anew."""
    monkeypatch.syspath_prepend(str(here))

    def write(source: str) -> str:
        (here / "service.py").write_text(source)
        sys.modules.pop("service", None)
        importlib.invalidate_caches()
        return "model.function.path=service.answer"

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    sys.modules.pop("service", None)


def fingerprint(store: Path) -> dict:
    return json.loads((store / "fingerprint.json").read_text())


def test_a_run_without_a_checkpoint(here):
    """Records as by hand, the note in each, and the row in the report; the same command goes on."""
    run_task("certify", *CERTIFY, OURS, "images.first=1", "store=run")
    ended = run_main("certify", *CERTIFY, OURS, "store=run")
    assert (ended.code, ended.error) == (0, None), ended.err
    assert "black box" in (here / "run" / "report.md").read_text()
    found, own = records(here / "run"), fingerprint(here / "run")
    assert (own["checkpoint"], own["backend"], set(own["own code"])) == (None, "plain", {__name__})
    cfg = compose("certify", *CERTIFY, OURS)
    by_hand = SmoothedClassifier(instantiate(cfg.model), CLASSES, noise=Gaussian(0.3)).eval()
    given = [(i, data_module(cfg).image(i)) for i in range(2)]
    for i, certificate in AdditiveCertifier(FixedN(64, 200)).certify(by_hand, L2, given, cfg.seed):
        assert found[i]["counts"] == certificate.counts
        assert found[i]["details"] == json.loads(json.dumps(certificate.details))
        assert found[i]["base"] == rows(given[i][1][None])[0]


def test_the_functions_code_is_part_of_the_run(service, here):
    """A store of the function as it was is not that of the function as it is."""
    run_task("certify", *CERTIFY, service(SOURCE), "images.first=1", "store=run")
    with pytest.raises(RequestError, match="own code differs"):
        run_task("certify", *CERTIFY, service(SOURCE.replace("9", "8")), "images.first=1", "store=run")


def test_the_code_of_a_partial_is_part_of_the_run(service, here):
    run_task("certify", *CERTIFY, service(PARTIAL), "images.first=1", "store=run")
    cfg = compose("certify", *CERTIFY, service(PARTIAL))
    assert "service" in own_code(cfg, L2, instantiate(cfg.model))["own code"]
    with pytest.raises(RequestError, match="own code differs"):
        run_task("certify", *CERTIFY, service(PARTIAL.replace("s=10", "s=5")), "images.first=2", "store=run")


def test_an_attack_on_another_function_is_not_joined(service, here):
    turned = [o for o in CERTIFY if not o.startswith(("threat", "transform", "law", "error", "certify", "sampling"))]
    turned += ["threat.low=-10", "threat.high=10", "law.sigma=20"]
    few = ("error.draws=64", "error.choose=32", "error.points=3", "sampling.n0=32", "sampling.n=128")
    run_task("certify", *turned, *few, service(SOURCE), "images.first=1", "store=certified")
    run_task("attack", *turned, service(SOURCE.replace("9", "8")), "attack.k=4", "images.first=1", "store=attacked")
    one_sentence(run_main("report", "stores=[certified,attacked]", "out=there"), "own code differs")


MISTAKES = {
    "no function": ("certify", CERTIFY, ("model.function.path",)),
    "a function that is not there": ("certify", (*CERTIFY, "model.function.path=no.such"), ("no.such",)),
    "weights": ("certify", (*CERTIFY, OURS, "checkpoint={file}"), ("does not fit the network",)),
    "nothing to train": ("train", (*CERTIFY, OURS), ()),
    "no gradients": ("sigma", (*CERTIFY, OURS), ()),
    "stability through labels": ("denoise", (*CERTIFY, OURS, "denoising=stability"), ("for a black box",)),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, network_file, here):
    """One sentence, exit status 2, nothing written."""
    command, overrides, words = MISTAKES[case]
    one_sentence(run_main(command, *(o.format(file=network_file) for o in overrides)), *words)
    assert snapshot(here) == {}


@pytest.fixture(scope="module")
def network_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("network") / "network.ckpt"
    torch.save(network().state_dict(), file)
    return file
