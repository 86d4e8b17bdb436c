"""`gsmooth sigma`: learning the noise of a trained classifier, its file, and the way to certificates and areas."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from conftest import QUIET, compose, interrupt, one_sentence, records, run_main, run_task, snapshot
from gsmooth_lightning.certify import AdditiveCertifier
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import SigmaModule
from gsmooth_lightning.model import fused, load_weights
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, LowRankGaussian, learned_noise
from gsmooth_lightning.tasks.setup import data_module
from gsmooth_lightning.train import CertifiedArea, Scales

PIXELS = (*QUIET, "data.size=8", "data.enlarge=null", "threat=l2", "transform=identity", "preprocess=none", "law=none")
PIXELS = (*PIXELS, "model.widths=[8,16]", "model.hidden=32")
START = (*PIXELS, "noise.sigma=0.2")
LEARN = (*START, "learn.epochs=2", "learn.limit_train_batches=4", "learn.batch_size=64", "learn.optimizer.lr=0.2")
LEARN = (*LEARN, "maximise.n0=8")
LOW_RANK = ("scales=low_rank", "scales.rank=2", "scales.start=0.3")
CERTIFY = (*START, "error=none", "certify=direct", "images.first=4", "sampling.n0=64", "sampling.n=500")


@pytest.fixture(scope="module")
def network_file(tmp_path_factory) -> Path:
    """A classifier of 8x8 digits under pixel noise."""
    store = tmp_path_factory.mktemp("classifier")
    options = ("error=none", "train.epochs=3", "train.batch_size=32", f"store={store}")
    return run_task("train", *START, *options)


@pytest.fixture(scope="module")
def learned(network_file, tmp_path_factory) -> Path:
    """The file of its learned noise, a sigma for each pixel."""
    return learn(network_file, f"store={tmp_path_factory.mktemp('sigma')}")


@pytest.fixture(scope="module")
def correlated(network_file, tmp_path_factory) -> Path:
    """The same of low rank beside the diagonal."""
    return learn(network_file, *LOW_RANK, f"store={tmp_path_factory.mktemp('low_rank')}")


def learn(network_file: Path, *more: str) -> Path:
    return run_task("sigma", *LEARN, f"checkpoint={network_file}", *more)


def held(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["noise"]


# ---------------------------------------------------------------- the file


def test_what_is_written(learned, correlated):
    """The file holds the noise, and the parameters that it comes from; no network. Beside it a table and a picture."""
    for file, names in ((learned, {"log_sigma"}), (correlated, {"log_sigma", "factors"})):
        content = torch.load(file, weights_only=True)
        assert {key.removeprefix("scales.") for key in content["state_dict"]} == names
        assert content["noise"]["sigma"].shape == (1, 8, 8)
        torch.testing.assert_close(content["noise"]["sigma"], content["state_dict"]["scales.log_sigma"].exp().double())
        table = (file.parent / "sigma.md").read_text()
        for words in ("size (softmax, 100 validation images)", "accuracy (softmax", "sigma, geometric mean"):
            assert words in table
        assert (file.parent / "sigma.png").read_bytes().startswith(b"\x89PNG")
        assert not list(file.parent.glob("resume*"))
    sigma = held(learned)["sigma"]
    assert sigma.max() > 1.2 * sigma.min()
    assert held(learned)["factors"] is None
    assert isinstance(learned_noise(learned), Gaussian)
    law = learned_noise(correlated)
    assert isinstance(law, LowRankGaussian)
    torch.testing.assert_close(law.factors, held(correlated)["factors"])


def test_learning_helps(learned, network_file):
    """Of 64 training images, by other draws: a larger loss under the initial noise."""
    cfg = compose("sigma", *LEARN, f"checkpoint={network_file}")
    network = instantiate(cfg.model)
    load_weights(network, network_file)
    data = data_module(cfg).split("train")
    x, y = torch.stack([data[i][0] for i in range(64)]), torch.tensor([data[i][1] for i in range(64)])
    losses = []
    for noise in (Gaussian(0.2), learned_noise(learned)):
        smoothed = SmoothedClassifier(network, 10, noise=noise, block=64).eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            own = instantiate(cfg.maximise)
            losses.append(float(own(smoothed, instantiate(cfg.threat), x, y)[0]))
    assert losses[1] < losses[0] - 0.02


@pytest.mark.parametrize("more", [("learn.ema=0.8",), LOW_RANK])
def test_an_interrupted_run_goes_on_to_the_same_sigma(more, network_file, here, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, SigmaModule, epoch=1)
        with pytest.raises(ZeroDivisionError):
            learn(network_file, *more, "store=cut")
    assert (here / "cut" / "resume.ckpt").exists()
    resumed, whole = learn(network_file, *more, "store=cut"), learn(network_file, *more, "store=whole")
    for key, value in held(whole).items():
        assert value is held(resumed)[key] is None or torch.equal(value, held(resumed)[key])
    assert (resumed.parent / "sigma.md").read_text() == (whole.parent / "sigma.md").read_text()


def test_patience_keeps_the_best_epoch_and_averages_are_what_is_saved(network_file, here):
    """The noise in the file is that of the weights in it; an average that hardly moves stays near the start."""
    kept = {}
    for name, option in (("best", "learn.patience=1"), ("averaged", "learn.ema=0.99")):
        content = torch.load(learn(network_file, option, f"store={name}"), weights_only=True)
        kept[name] = content["noise"]["sigma"]
        torch.testing.assert_close(kept[name], content["state_dict"]["scales.log_sigma"].exp().double())
    assert (kept["averaged"].log() - np.log(0.2)).abs().max() < (kept["best"].log() - np.log(0.2)).abs().max() / 3


def test_a_table_that_was_not_written_is_written_later(learned, network_file, here):
    """After a kill between the noise and the table; a finished run is not measured again."""
    shutil.copytree(learned.parent, here / "run")
    (here / "run" / "sigma.md").unlink(), (here / "run" / "sigma.png").unlink()
    learn(network_file, "store=run")
    assert (here / "run" / "sigma.md").read_text() == (learned.parent / "sigma.md").read_text()
    before = snapshot(here)
    learn(network_file, "store=run")
    assert snapshot(here) == before


def test_what_counts_for_the_folder(learned, network_file, here):
    """The network's bytes and every setting of the optimisation; not where the file lies."""
    elsewhere = shutil.copy(network_file, here / "own.ckpt")
    with pytest.raises(RequestError, match="maximise differs"):
        run_task("sigma", *LEARN, f"checkpoint={network_file}", "maximise.weight=1", f"store={learned.parent}")
    with pytest.raises(RequestError, match="scales differs"):
        run_task("sigma", *LEARN, f"checkpoint={network_file}", *LOW_RANK, f"store={learned.parent}")
    learn(Path(elsewhere), f"store={learned.parent}")  # finished
    content = torch.load(network_file, weights_only=True)
    content["epoch"] += 1
    torch.save(content, elsewhere)
    with pytest.raises(RequestError, match="checkpoint differs"):
        learn(Path(elsewhere), f"store={learned.parent}")


@pytest.mark.parametrize("range_of", ["rotation"])
def test_the_range_of_a_transformation_is_learned_too(range_of, network_file, here):
    kept = [o for o in LEARN if not o.startswith(("threat", "transform", "law"))]
    options = (f"threat={range_of}", f"transform={range_of}", "law=gaussian", "law.sigma=20", "learn.epochs=1")
    found = run_task(
        "sigma", *kept, *options, "maximise=range", "maximise.draws=2", "maximise.points=3",
        "learn.limit_train_batches=3", f"checkpoint={network_file}", "store=range",
    )  # fmt: skip
    assert held(found)["sigma"].std() > 0
    assert "size (softmax" in (here / "range" / "sigma.md").read_text()


# ---------------------------------------------------------------- certificates


def certify(network_file: Path, file: Path | None, *more: str) -> Path:
    given = () if file is None else (f"learned={file}",)
    return run_task("certify", *CERTIFY, f"checkpoint={network_file}", *given, *more)


@pytest.mark.parametrize("kind", ["learned", "correlated"])
def test_the_command_certifies_the_law_of_the_file(kind, request, network_file, here):
    """Records as by the Python API with the law made by hand from the file's numbers."""
    file = request.getfixturevalue(kind)
    found = records(certify(network_file, file, "store=run"))
    cfg = compose("certify", *CERTIFY, f"checkpoint={network_file}")
    network = instantiate(cfg.model)
    load_weights(network, network_file)
    sigma, factors = held(file)["sigma"], held(file)["factors"]
    noise = Gaussian(sigma) if factors is None else LowRankGaussian(sigma, factors)
    smoothed = SmoothedClassifier(network, 10, noise=noise, block=64).eval()
    smoothed.base, _ = fused(network, torch.rand(64, 1, 8, 8), "fx")
    data = data_module(cfg)
    images = [(i, data.image(i)) for i in range(4)]
    own = AdditiveCertifier(FixedN(64, 500))
    assert any(r["radius"] > 0 for r in found)
    certificates = dict(own.certify(smoothed, instantiate(cfg.threat), images, cfg.seed))
    for record in found:
        certificate = certificates[record["index"]]
        for name in ("prediction", "radius", "selection", "counts", "pa", "guarantee", "alpha", "n"):
            assert record[name] == getattr(certificate, name), name
        assert record["details"] == json.loads(json.dumps(certificate.details))
        if record["radius"]:
            region = record["details"]["region"]
            assert region["axis_least"] <= region["axis_mean"] <= region["axis_largest"]
            assert region["area"] == pytest.approx(64 * np.log(region["axis_mean"]), abs=1e-6)


def test_a_certificate_is_of_the_files_bytes(learned, correlated, network_file, here):
    """Another file is another run; so is the noise that the file takes the place of no more."""
    copied = shutil.copy(learned, here / "own.ckpt")
    store = certify(network_file, Path(copied), "images.first=1", "store=run")
    certify(network_file, learned, "images.first=1", "noise.sigma=0.3", "store=run")  # the same noise
    for other in (correlated, None):
        with pytest.raises(RequestError, match="noise differs"):
            certify(network_file, other, "images.first=1", "store=run")
    assert len(records(store)) == 1


def test_the_areas_report(learned, network_file, here, monkeypatch):
    """area=true: radii are mean axes, two curves, and a picture of accuracy against area."""
    certify(network_file, learned, "store=learned")
    certify(network_file, None, "store=isotropic")
    ended = run_main("report", "stores=[learned,isotropic]", "area=true", "out=there")
    assert (ended.code, ended.error) == (0, None), ended.err
    for name in ("report.png", "area.png"):
        assert (here / "there" / name).read_bytes().startswith(b"\x89PNG")
    text = (here / "there" / "report.md").read_text()
    for words in ("mean axis", "ellipsoid (medians, correct images)", "half axes have the radius as their geometric"):
        assert words in text
    run_main("report", "stores=[learned]", "out=plain")
    assert not (here / "plain" / "area.png").exists()
    assert "radii in l2" in (here / "plain" / "report.md").read_text()


def test_areas_follow_votes_that_are_bounded_again(learned, network_file, here):
    """A report at a stricter alpha shows the areas of that alpha, not those of the one before."""
    for name, alpha in (("run", "1e-3"), ("strict", "1e-9")):
        certify(network_file, learned, f"sampling.alpha={alpha}", f"store={name}")
    rows = []
    for store, again in (("strict", ()), ("run", ("alpha=1e-9",)), ("run", ())):
        assert run_main("report", f"stores=[{store}]", *again, "area=true", "out=there").code == 0
        lines = (here / "there" / "report.md").read_text().splitlines()
        rows.append([line.split("|", 2)[2] for line in lines if "ellipsoid (" in line or "median certified" in line])
    assert len(rows[0]) == 2
    assert rows[0] == rows[1] != rows[2]


def test_a_file_that_changed_bounds_nothing_again(learned, correlated, network_file, here):
    """The radius of votes is of the noise that they were sampled under, which the file held then."""
    copied = shutil.copy(learned, here / "own.ckpt")
    certify(network_file, Path(copied), "store=run")
    assert run_main("report", "stores=[run]", "alpha=0.01", "out=there").code == 0
    content = torch.load(copied, weights_only=True)
    content["noise"]["sigma"] *= 10
    torch.save(content, copied)
    one_sentence(run_main("report", "stores=[run]", "alpha=0.01", "out=there"), "run", "noise differs")
    Path(copied).unlink()
    one_sentence(run_main("report", "stores=[run]", "alpha=0.01", "out=there"), "own.ckpt", "learned=")


# ---------------------------------------------------------------- mistakes


class Labels(nn.Module):
    """A network that returns classes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).argmax(1)


def test_labels_have_no_gradient(here):
    """Refused by the module, and by the command before a folder is made."""
    torch.save(Labels().state_dict(), here / "labels.ckpt")
    before = snapshot(here)
    kept = [o for o in LEARN if not o.startswith("model")]
    own = ("model=custom", f"model._target_={__name__}.Labels", "checkpoint=labels.ckpt")
    one_sentence(run_main("sigma", *kept, *own), "labels", "logits")
    assert snapshot(here) == before
    smoothed = SmoothedClassifier(Labels(), 10, noise=Gaussian(0.2), block=8).eval()
    with pytest.raises(RequestError, match="labels"):
        CertifiedArea(4)(smoothed, instantiate(compose("sigma", *START).threat), torch.rand(2, 1, 8, 8), torch.zeros(2))


def spoiled(kind: str, file: Path, source: Path) -> None:
    """A file of noise that is none."""
    content = torch.load(source, weights_only=True)
    noise, sigma = content["noise"], content["noise"]["sigma"]
    if kind in ("nan", "inf", "-1", "0", "1000"):
        sigma[0, 3, 3] = float(kind)
    elif kind == "no sigma":
        del noise["sigma"]
    elif kind == "words":
        noise["sigma"] = "much"
    elif kind == "words as factors":
        noise["factors"] = "many"
    elif kind == "nan factors":
        noise["factors"] = torch.full((2, 1, 8, 8), torch.nan)
    elif kind == "other factors":
        noise["factors"] = torch.ones(2, 1, 8, 7)
    elif kind == "other images":
        noise["sigma"] = torch.ones(1, 7, 8)
    elif kind == "an axis too many":
        noise["sigma"] = torch.ones(1, 1, 1, 8, 8)
    torch.save(content, file)
    if kind == "text":
        file.write_text("no noise\n")
    elif kind == "cut":
        file.write_bytes(source.read_bytes()[:500])
    elif kind == "missing":
        file.unlink()


FILES = {
    "missing": ("own.ckpt", "gsmooth sigma"),
    "text": ("own.ckpt is not a file of learned noise",),
    "cut": ("own.ckpt is not a file of learned noise",),
    "no sigma": ("own.ckpt holds no learned noise", "gsmooth sigma"),
    "words": ("own.ckpt holds no learned noise",),
    "words as factors": ("own.ckpt holds no learned noise",),
    "nan": ("sigma must be positive and finite, got nan",),
    "inf": ("sigma must be positive and finite, got inf",),
    "-1": ("sigma must be positive and finite, got -1",),
    "0": ("sigma must be positive and finite, got 0",),
    "1000": ("too wide", "sigma must be below"),
    "nan factors": ("factors must be finite",),
    "other factors": ("(2, 1, 8, 7)",),
    "other images": ("(1, 7, 8)", "(1, 8, 8)"),
    "an axis too many": ("(1, 1, 1, 8, 8)", "(1, 8, 8)"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_hold_no_noise(kind, learned, network_file, here):
    spoiled(kind, here / "own.ckpt", learned)
    before = snapshot(here)
    one_sentence(run_main("certify", *CERTIFY, f"checkpoint={network_file}", "learned=own.ckpt"), *FILES[kind])
    assert snapshot(here) == before


def test_a_classifiers_file_is_no_noise(network_file, here):
    ended = run_main("certify", *CERTIFY, f"checkpoint={network_file}", f"learned={network_file}")
    one_sentence(ended, "holds no learned noise; give a file that `gsmooth sigma` wrote")
    assert snapshot(here) == {}


MISTAKES = {
    "no network": ((), ("checkpoint=FILE", "gsmooth train")),
    "a missing network": (("checkpoint=nosuch",), ("nosuch", "checkpoint=")),
    "another network": (("checkpoint={network}", "model.hidden=16"), ("does not fit the network",)),
    "noise as a network": (("checkpoint={learned}",), ("does not fit the network",)),
    "no noise": (("checkpoint={network}", "noise=none"), ("noise=gaussian",)),
    "other noise": (("checkpoint={network}", "noise=laplace"), ("independent Gaussian noise", "noise=gaussian")),
    "learned twice": (("checkpoint={network}", "learned={learned}"), ("leave learned out",)),
    "the area of a rotation": (
        ("checkpoint={network}", "threat=rotation", "transform=rotation", "law=gaussian"),
        ("certified area is of pixel noise alone", "maximise=range"),
    ),
    "the range of pixels": (("checkpoint={network}", "maximise=range"), ("use law=gaussian, or maximise=area",)),
    "the area of another norm": (("checkpoint={network}", "threat=linf"), ("use threat=l2",)),
    "blocks of a picture that has three axes": (("checkpoint={network}", "scales.tied=[1,1]"), ("3 sides of a block",)),
    "a negative weight": (("checkpoint={network}", "maximise.weight=-1"), ("maximise.weight must be at least 0",)),
    "no draws": (("checkpoint={network}", "maximise.n0=0"), ("maximise.n0 must be a whole number",)),
    "an option too many": (("checkpoint={network}", "+scales.foo=1"), ("foo", "options of scales")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, learned, network_file, here):
    """One sentence that says what to change, exit status 2, and nothing written."""
    overrides, words = MISTAKES[case]
    given = [o.format(network=network_file, learned=learned) for o in overrides]
    base = [o for o in PIXELS if not any(g.split("=")[0] == o.split("=")[0] for g in given)]
    noise = () if any(g.startswith("noise=") for g in given) else ("noise.sigma=0.2",)
    one_sentence(run_main("sigma", *base, *noise, *given), *words)
    assert snapshot(here) == {}


def test_steps_that_leave_all_bounds_end_in_a_sentence(network_file, here):
    """A learning rate of 1e4 makes sigma infinite or 0."""
    ended = run_main(
        "sigma", *LEARN, f"checkpoint={network_file}", "learn.optimizer.lr=1e4", "learn.scheduler=null", "store=run"
    )
    one_sentence(ended, "learn.optimizer.lr")


def test_the_table_is_of_the_module_s_own_measure(learned, network_file):
    """The geometric mean, least and largest of the file's sigma."""
    sigma = held(learned)["sigma"]
    table = (learned.parent / "sigma.md").read_text()
    assert f"{float(sigma.log().mean().exp()):.4g}" in table
    assert f"{float(sigma.min()):.4g} to {float(sigma.max()):.4g}" in table
    module = SigmaModule(
        SmoothedClassifier(nn.Identity(), 10, noise=Gaussian(0.2)),
        instantiate(compose("sigma", *START).threat),
        Scales(Gaussian(sigma), (1, 8, 8), (1, 1, 1)),
        CertifiedArea(),
        torch.optim.Adam,
    )
    (axes,) = module.picture().axes
    assert f"{float(sigma.min()):.3g} to {float(sigma.max()):.3g}" in axes.get_title()
    shown = axes.images[0].get_array()
    assert shown.shape == (8, 8)
    assert (shown.min(), shown.max()) == (0, 1)
