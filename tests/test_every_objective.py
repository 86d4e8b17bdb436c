"""What consistency, stability training, MACER, TRADES and SmoothMix have in common: the network's state, the draws,
refusals, and a few steps of each through Lightning."""

import importlib.util
import math
from functools import partial

import pytest
import torch
from torch import nn

from conftest import ROOT, compose
from gsmooth_lightning.attack import pgd
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model import load_weights
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.tasks.setup import seeded_network
from gsmooth_lightning.train import Consistency, Macer, SmoothMix, StabilityTraining, Trades
from gsmooth_lightning.transform import Rotation
from objectives import (
    CLASSES,
    PGD,
    SHAPE,
    THREATS,
    N,
    Seen,
    Shift,
    configured,
    network_with_statistics,
    problem,
    trained,
)

__all__ = ["problem"]  # the fixture


MAKERS = {
    "consistency": partial(Consistency, m=3),
    "stability": StabilityTraining,
    "macer": partial(Macer, 3.0, m=4),
    "trades": partial(Trades, PGD, 0.5),
    "smoothmix": partial(SmoothMix, pgd, 0.5, steps=3),
}
EVERY = pytest.mark.parametrize("name", MAKERS)


# -------------------------------------------------- the network, and autocast


PASSES = {"consistency": 1, "stability": 2, "macer": 1, "trades": 2, "smoothmix": 2}
"""Of the network in the loss, each of all draws."""

ATTACKED = {"trades": 5, "smoothmix": 3}
"""Those of the attack, of all draws too; that of the fixed p of TRADES among them."""


@EVERY
def test_attacks_leave_mode_statistics_and_flags_alone(name):
    """They see evaluation mode without gradients of the weights; the loss sees training mode."""
    base = network_with_statistics().train()
    base[4].bias.requires_grad_(False)
    seen = Seen(base)
    smoothed = SmoothedClassifier(base, CLASSES, noise=Gaussian(0.5)).train()
    x, y = torch.rand(N, *SHAPE), torch.tensor([0, 1, 2, 0, 1])
    loss, _ = MAKERS[name]()(smoothed, x, y, 0)
    assert [found[1:] for found in seen] == [(False, False)] * ATTACKED.get(name, 0) + [(True, True)] * PASSES[name]
    assert base[1].num_batches_tracked == PASSES[name]
    assert all(module.training for module in base.modules())
    assert [key for key, p in base.named_parameters() if not p.requires_grad] == ["4.bias"]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in base.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["trades", "smoothmix"])
def test_a_failed_attack_gives_the_network_back(name):
    base = network_with_statistics().train()
    smoothed = SmoothedClassifier(base, CLASSES, noise=Gaussian(0.5))

    def fails(*args, **options):
        raise RuntimeError("out of memory")

    objective = Trades(fails, 0.5) if name == "trades" else SmoothMix(fails, 0.5)
    with pytest.raises(RuntimeError, match="out of memory"):
        objective(smoothed, torch.rand(N, *SHAPE), torch.tensor([0, 1, 2, 0, 1]), 0)
    assert base.training
    assert all(p.requires_grad for p in base.parameters())
    assert base[1].num_batches_tracked == 0


@EVERY
def test_gradients_are_finite_under_bf16_autocast(problem, name):
    """And the loss that of full precision, roughly."""
    smoothed, x, y = problem
    found = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        smoothed.base.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = MAKERS[name]()(smoothed, x, y, 0)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in smoothed.base.parameters())
        found[enabled] = loss.item()
    assert found[True] == pytest.approx(found[False], rel=0.05)
    assert smoothed.base[1].weight.grad.abs().max() > 1e-3


# -------------------------------------------------- the transformation


ANGLES = {"consistency": 3, "stability": 1, "macer": 4, "trades": 1, "smoothmix": 1}
"""Draws of theta: one for each of the m, or one that attack and loss share."""


@EVERY
@pytest.mark.parametrize("semantic", [True, False])
def test_angles_are_drawn_for_each_draw_or_not_at_all(monkeypatch, name, semantic):
    base = nn.Sequential(nn.Flatten(), nn.Linear(49, CLASSES))
    seen, asked = Seen(base), []
    smoothed = SmoothedClassifier(base, CLASSES, Rotation(), law=Gaussian(20.0))

    def draw_parameters(source, n):
        asked.append(torch.tensor([[10.0], [-25.0], [0.0], [40.0]]) + 7 * len(asked))
        return asked[-1]

    monkeypatch.setattr(smoothed, "draw_parameters", draw_parameters)
    x = torch.rand(4, 1, 7, 7)
    still = {"trades": partial(Trades, Shift(0.0), 0.5), "smoothmix": partial(SmoothMix, lambda p, x, y, **o: x, 0.5)}
    _, logits = still.get(name, MAKERS[name])(semantic=semantic)(smoothed, x, torch.tensor([0, 1, 2, 0]), 0)
    assert len(asked) == (ANGLES[name] if semantic else 0)
    turned = [Rotation()(x, angles) for angles in asked] if semantic else [x] * ANGLES[name]
    expected = torch.cat(turned * 2 if name == "smoothmix" else turned)  # whose two draws share one
    torch.testing.assert_close(seen[-1][0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits, base(turned[0]))
    if name == "stability":
        torch.testing.assert_close(seen[0][0], x)


@EVERY
def test_draws_are_independent_and_fresh(problem, name):
    smoothed, x, y = problem
    seen, objective = Seen(smoothed.base), MAKERS[name]()
    for _ in range(2):
        objective(smoothed, x, y, 0)
    first, second = seen[len(seen) // 2 - 1][0], seen[-1][0]
    assert not torch.isclose(first, second).any()
    if name in ("consistency", "macer"):
        draws = second.unflatten(0, (-1, N)) - x
        assert len({round(float(draw.sum()), 4) for draw in draws}) == objective.m > 1


# -------------------------------------------------- refusals


REFUSED = {
    "consistency": [{"m": 0}, {"m": 1.5}, {"m": True}, {"weight": -1}, {"entropy": math.nan}, {"weight": "much"}],
    "stability": [{"weight": -0.1}, {"weight": math.inf}],
    "macer": [
        {"weight": -1},
        {"m": 0},
        {"gamma": 0},
        {"gamma": -1},
        {"beta": 0},
        {"beta": math.inf},
        {"start": -1},
        {"start": 1.5},
    ],
    "trades": [{"epsilon": -1}, {"epsilon": math.inf}, {"weight": -1}, {"warmup": -1}, {"warmup": 1.5}],
    "smoothmix": [{"m": 0}, {"steps": 0}, {"steps": 2.5}, {"alpha": 0}, {"alpha": math.nan}, {"weight": -1}],
}
REQUIRED = {
    "consistency": Consistency,
    "stability": StabilityTraining,
    "macer": lambda **o: Macer(**{"weight": 3.0, **o}),
    "trades": lambda **o: Trades(PGD, **{"epsilon": 0.5, **o}),
    "smoothmix": lambda **o: SmoothMix(pgd, **{"alpha": 0.5, **o}),
}


@pytest.mark.parametrize(("name", "options"), [(name, o) for name, bad in REFUSED.items() for o in bad])
def test_bad_options_are_refused_by_name(name, options):
    REQUIRED[name]()
    with pytest.raises(RequestError, match=rf"^objective\.{next(iter(options))} must be [^.]*[^\n]*$"):
        REQUIRED[name](**options)


@pytest.mark.parametrize("name", ["trades", "smoothmix"])
@pytest.mark.parametrize("box", [[1, 0], [0], [0, math.nan]])
def test_bad_boxes_are_refused(name, box):
    with pytest.raises(RequestError, match="box must be"):
        REQUIRED[name](box=box)


# -------------------------------------------------- training


@EVERY
@pytest.mark.parametrize("threat", THREATS)
def test_every_objective_trains_a_few_steps(tmp_path, name, threat):
    """The saved weights are finite, differ from the first ones, and load; only passes of the loss move statistics."""
    cfg = configured(name, threat=threat)
    path, content = trained(cfg, tmp_path)
    base = seeded_network(cfg)
    first = {key: value.clone() for key, value in base.state_dict().items()}
    load_weights(base, path)
    for key, value in base.state_dict().items():
        assert torch.isfinite(value.float()).all()
        assert not torch.equal(value, first[key]), key
    assert int(base.features[1].num_batches_tracked) == 4 * PASSES[name]
    assert content["global_step"] == 4


@EVERY
def test_every_objective_separates_two_blobs(name):
    """MACER with a small weight: at 3 from the first step on, the hinge keeps the class that the random weights gave
    to all images, which is why the papers wait for the learning rate to fall."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = (0.3 + 0.4 * y[:, None].float() + 0.05 * torch.randn(60, 2, generator=generator)).view(60, 1, 1, 2)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    smoothed = SmoothedClassifier(base, 2, noise=Gaussian(0.1))
    objective = Macer(0.1, m=4) if name == "macer" else MAKERS[name]()
    optimizer = torch.optim.Adam(base.parameters(), lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        objective(smoothed, x, y, 0)[0].backward()
        optimizer.step()
    with torch.no_grad():
        assert (base(x).argmax(1) == y).float().mean() > 0.95


def test_macer_trains_on_the_likelihood_alone_before_its_start(tmp_path):
    """The epoch reaches it: in a training of one epoch, start = 1 is weight = 0."""
    found = {}
    for name, options in {"alone": ("weight=0",), "waits": ("start=1",), "hinge": ("start=0",)}.items():
        cfg = configured("macer", *(f"objective.{option}" for option in ("m=2", *options)))
        _, content = trained(cfg, tmp_path / name)
        found[name] = content["state_dict"]["smoothed.base.head.1.weight"]
    assert torch.equal(found["waits"], found["alone"])
    assert not torch.equal(found["hinge"], found["alone"])


@pytest.mark.parametrize("name", ["trades", "smoothmix"])
def test_the_configured_box_is_the_datas_range(name):
    assert list(compose("train", f"objective={name}", "data=speech_commands").objective.box) == [-1, 1]


# -------------------------------------------------- the benchmark


def test_the_benchmark_prints_a_row_for_every_objective(capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("training", ROOT / "benchmarks" / "training.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["training.py", "--rounds", "1", "--batch", "4"])
    module.main()
    header, _, *table = capsys.readouterr().out.splitlines()
    assert header.startswith("`python benchmarks/training.py --rounds 1 --batch 4`")
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in table[2:])}
    assert list(rows) == sorted(path.stem for path in (ROOT / "conf" / "objective").glob("*.yaml"))
    assert float(rows["noise"][1]) == 1
    assert all(float(cells[0]) > 0 for cells in rows.values())
