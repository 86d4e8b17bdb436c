"""What a dry run states, against what a run then does: evaluations, the largest radius, alpha, time and memory."""

import math
import re

import pytest
from hydra.utils import instantiate
from scipy.stats import norm

from conftest import QUIET, SMALL, compose, one_sentence, records, run_main, run_task, snapshot
from gsmooth_lightning.certify import Certifier
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.tasks.forecast import forecast
from gsmooth_lightning.tasks.run import Run
from gsmooth_lightning.tasks.setup import prepare

BLOCK = 64
PIXELS = (
    *QUIET,
    *("threat=l2", "transform=identity", "law=none", "preprocess=none", "error=none", "certify=direct"),
    *("noise.sigma=0.25", "sampling.n0=32", "sampling.n=128", "images.first=2"),
)
CONSTANT = (*(o for o in PIXELS if "backend" not in o), "model=black_box", "model.function.path=constant.zeros")
COVER = (*(o for o in SMALL if "law" not in o), "law=none", "certify=cover", "images.first=2", "sampling.n=300")


def ready(*overrides: str) -> tuple[Run, Certifier]:
    """What `gsmooth certify` has in hand before it opens a store."""
    cfg = compose("certify", *overrides)
    run, certifier = prepare(cfg, "certify", ("error", "sampling", "certify")), instantiate(cfg.certify)
    certifier.check(run.smoothed, run.threat)
    return run, certifier


def stated(*overrides: str) -> dict[str, str]:
    return forecast(*ready(*overrides))


def number(row: str) -> float:
    """The first number of a row."""
    return float(re.findall(r"\d[\d,.]*(?:e[-+]\d+)?", row)[0].replace(",", ""))


@pytest.fixture
def constant(here, monkeypatch):
    """A working folder with a network that gives every input the class 0: all n votes are for one class."""
    (here / "constant.py").write_text(
        "import torch\n\n\ndef zeros(x):\n    return torch.zeros(len(x), dtype=torch.long)\n"
    )
    monkeypatch.syspath_prepend(here)
    return here


# ---------------------------------------------------------------- evaluations


@pytest.mark.parametrize(
    "overrides",
    [
        (*SMALL, "images.first=2"),
        (*PIXELS, "sampling.n0=33", "sampling.n=129", "block=32"),
        (*PIXELS, "votes=soft", "sampling=soft"),
    ],
    ids=["joint", "odd numbers", "soft"],
)
def test_a_fixed_plan_takes_the_evaluations_stated(checkpoint, here, overrides):
    """ceil(n0 / block) block + ceil(n / block) block, for every image."""
    at_most = number(stated(*overrides, f"checkpoint={checkpoint}")["evaluations an image"])
    run_task("certify", *overrides, f"checkpoint={checkpoint}", "store=run")
    assert [record["evaluations"] for record in records(here / "run")] == [at_most] * 2


@pytest.mark.parametrize(
    "overrides",
    [
        (
            *SMALL,
            "sampling=sequential",
            "sampling.radii=[0,5,9]",
            "images.first=2",
            "sampling.n0=32",
            "sampling.n=1000",
        ),
        (*PIXELS, "sampling=anytime", "sampling.n=1000"),
        (*COVER, "certify.margins=[0.5]", "noise.sigma=0.5"),
    ],
    ids=["sequential", "anytime", "cover"],
)
def test_a_sequential_plan_takes_no_more_than_stated(checkpoint, here, overrides):
    """And on some image it takes less. (Slices of one width are not cut.)"""
    at_most = number(stated(*overrides, f"checkpoint={checkpoint}")["evaluations an image"])
    run_task("certify", *overrides, f"checkpoint={checkpoint}", "store=run")
    spent = [record["evaluations"] for record in records(here / "run")]
    assert max(spent) <= at_most
    assert min(spent) < at_most


def test_enumeration_visits_every_shift(checkpoint):
    """28 * 28 shifts in blocks of 64: 832; nothing is left to chance."""
    shifts = ("threat=cyclic_translation", "transform=cyclic_translation", "law=uniform", "noise=none")
    rows = stated(*QUIET, *shifts, "certify=enumerate", "preprocess=none", f"checkpoint={checkpoint}")
    assert number(rows["evaluations an image"]) == 832
    assert number(rows["false certificates expected"]) == 0


def test_nested_plans_multiply(checkpoint):
    """(32 + 128) outer draws of (64 + 256) inner ones; of two layers, the outer one of 64 + 200 draws of its own."""
    nested = (*SMALL, "error=image_hard", "certify=nested_published", f"checkpoint={checkpoint}")
    assert number(stated(*nested)["evaluations an image"]) == (32 + 128) * (64 + 256)
    rows = stated(*nested, "error.partition=halves")
    assert number(rows["evaluations an image"]) == (32 + 128) * (64 + 200) * (64 + 256)


def test_choosing_a_sigma_counts(checkpoint):
    """Forward and backward passes of 5 steps with 32 draws, the first votes, and the certificate's own."""
    own = ("certify=per_input", "certify.steps=5", "maximise.n0=32", f"checkpoint={checkpoint}")
    rows = stated(*PIXELS, *own)
    assert number(rows["evaluations an image"]) == 192 + 32 * (1 + 2 * 5)
    assert rows["certified radius"] == "not known beforehand"


def test_slices_of_the_first_image(checkpoint):
    """A selection, a look at each wave of slices, and n draws for each of them; the row says that more may come."""
    row = stated(*COVER, f"checkpoint={checkpoint}")["evaluations an image"]
    slices = int(re.findall(r"for ([\d,]+) slices", row)[0].replace(",", ""))
    assert number(row) == BLOCK + math.ceil(slices / BLOCK) * BLOCK + slices * math.ceil(300 / BLOCK) * BLOCK
    assert "more for the parts of those that fail" in row


# ---------------------------------------------------------------- the largest radius


def test_ceiling_of_pixel_noise(checkpoint):
    """sigma z(alpha^(1/n)): n of n votes, Clopper-Pearson. Rounded up."""
    rows = stated(*PIXELS, f"checkpoint={checkpoint}")
    exact = 0.25 * norm.ppf(1e-3 ** (1 / 128))
    assert exact <= number(rows["certified radius"]) <= exact + 1e-4
    assert "l2" in rows["certified radius"]


def test_ceiling_of_a_transformation(checkpoint):
    """sigma_theta z(alpha^(1/n)) degrees, or the threat's range if that is less."""
    rows = stated(*SMALL, "law.sigma=4", f"checkpoint={checkpoint}")
    exact = 4 * norm.ppf(1e-3 ** (1 / 128))
    assert exact <= number(rows["certified radius"]) <= exact + 1e-4
    assert number(stated(*SMALL, f"checkpoint={checkpoint}")["certified radius"]) == 10


def test_ceiling_of_a_sequential_plan(checkpoint):
    """The largest of its radii."""
    plan = ("sampling=sequential", "sampling.radii=[0,2,5]")
    assert number(stated(*SMALL, *plan, f"checkpoint={checkpoint}")["certified radius"]) == 5


@pytest.mark.parametrize(
    "plan", [(), ("sampling.bounds=two",), ("certify.top_k=2",), ("votes=hard", "sampling.n=1000")]
)
def test_n_votes_for_one_class_certify_the_ceiling(constant, plan):
    """Of a constant classifier, but for the grid's rounding: at most .1 % below what was stated, and never above."""
    ceiling = number(stated(*CONSTANT, *plan)["certified radius"])
    run_task("certify", *CONSTANT, *plan, "store=run")
    for record in records(constant / "run"):
        radius = max(record["radius"]) if isinstance(record["radius"], list) else record["radius"]
        assert 0.999 * ceiling - 1e-4 <= radius <= ceiling


# ---------------------------------------------------------------- alpha, images, time, memory


def test_false_certificates_add_up(checkpoint):
    """6 images at alpha = .001 for the votes and .0001 for the error bound."""
    row = stated(*SMALL, f"checkpoint={checkpoint}")["false certificates expected"]
    assert number(row) == pytest.approx(6 * 0.0011)
    assert "alpha 0.0011 an image" in row


def test_finished_images_are_not_counted_again(checkpoint, here):
    """Of 6 images 2 are done: the forecast is for 4, and stated for the first of them."""
    overrides = (*PIXELS, f"checkpoint={checkpoint}", "store=run", "images.first=6")
    run_task("certify", *overrides, "images.first=2")
    before = snapshot(here)
    rows = stated(*overrides)
    assert rows["images"].endswith("2 of them done")
    assert "for 4 images" in rows["time left"]
    assert rows["what follows is stated for"].startswith("image 2 of shape (1, 28, 28)")
    assert "0:00:00 for 0 images" in stated(*overrides, "images.first=2")["time left"]
    with pytest.raises(RequestError, match="the store of another run: seed differs"):
        stated(*overrides, "seed=1")
    assert snapshot(here) == before, "nothing is written"


def test_a_bound_for_all_images_is_calibrated_for_the_forecast_alone(checkpoint, here):
    """One image is measured, the time of 8 of them stated, and the bound itself left as it was. alpha_E counts."""
    calibrated = ("error=pooled", "error.calibration=8", "error.draws=64", f"checkpoint={checkpoint}", "store=run")
    run, certifier = ready(*(o for o in SMALL if not o.startswith("error.")), *calibrated)
    rows = forecast(run, certifier)
    assert "to calibrate the error bound" in rows["time left"]
    assert number(rows["false certificates expected"]) == pytest.approx(6 * (1e-3 + certifier.error.alpha))
    assert certifier.error.fitted is None
    assert not (here / "run").exists()


def test_time_is_shared_by_the_processes(checkpoint):
    """images * (seconds before the votes + seconds for them) / processes."""
    many = (*(o for o in SMALL if o != "trainer=cpu"), "images.first=300", f"checkpoint={checkpoint}")
    for devices in (1, 2):
        strategy = ("trainer=ddp", "trainer.accelerator=cpu", f"devices={devices}")
        rows = stated(*many, *strategy)
        before, votes = (
            float(s) for s in re.findall(r"[\d.e-]+(?= before)|(?<=at most )[\d.e-]+", rows["seconds an image"])
        )
        hours, minutes, seconds = map(int, re.findall(r"(\d+):(\d+):(\d+)", rows["time left"])[0])
        expected = 300 * (before + votes) / devices  # of numbers with three digits; the time is rounded up to a second
        assert 3600 * hours + 60 * minutes + seconds == pytest.approx(expected, abs=1 + 0.005 * expected)


def test_memory(checkpoint):
    """64 inputs of 28 x 28 float32; the network's weights; and this process holds more than them."""
    row = stated(*PIXELS, "backend=plain", f"checkpoint={checkpoint}")["memory"]
    weights = sum(w.nbytes for w in instantiate(compose("certify").model).state_dict().values())
    inputs, network, peak = (float(size) for size in re.findall(r"([\d.e+]+) MiB", row))
    assert inputs == pytest.approx(64 * 28 * 28 * 4 / 2**20, rel=1e-3)
    assert network == pytest.approx(weights / 2**20, rel=1e-3)
    assert peak > inputs + network


# ---------------------------------------------------------------- the command


def test_dry_run_prints_and_writes_nothing(checkpoint, here):
    """`gsmooth certify dry_run=true`: a table, and an empty folder."""
    ended = run_main("certify", *SMALL, f"checkpoint={checkpoint}", "dry_run=true")
    assert (ended.code, ended.err, ended.error) == (0, "", None)
    for row in ("evaluations an image", "certified radius", "false certificates expected", "time left", "memory"):
        assert row in ended.out
    assert not list(here.iterdir())
    one_sentence(run_main("certify", *SMALL, f"checkpoint={checkpoint}", "dry_run=perhaps"), "dry_run", "true or false")
