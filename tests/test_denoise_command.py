"""`gsmooth denoise`: a denoiser before a classifier of clean images, its file, and the way to certificates."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

import layouts
from conftest import QUIET, compose, interrupt, one_sentence, records, run_main, run_task, snapshot, timeless
from gsmooth_lightning.certify import AdditiveCertifier
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import DenoiserModule
from gsmooth_lightning.model import SmallCNN, dncnn, fused, load_weights, unet_denoiser
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.tasks.launch import without_leftovers
from gsmooth_lightning.tasks.report import load, show, with_other_bounds
from gsmooth_lightning.tasks.setup import data_module, trained_network

PLAIN = (*QUIET, "data.size=8", "data.enlarge=null", "error=none", "preprocess=none")
SMALL = ("model.widths=[8,16]", "model.hidden=32")
PIXELS = (*PLAIN, *SMALL, "threat=l2", "transform=identity", "law=none")
NOISY = (*PIXELS, "noise.sigma=0.3")
BRIGHTER = (*PLAIN, *SMALL, "threat=brightness", "transform=brightness", "law.sigma=0.3", "noise.sigma=0.3")
FIT = ("train.batch_size=32", "train.optimizer.lr=1e-2")
DNCNN = ("denoiser.depth=3", "denoiser.width=8")
TRAIN = (*NOISY, *FIT, "train.epochs=2", "train.limit_train_batches=20")
LEARN = (*TRAIN, *DNCNN)
CERTIFY = (*NOISY, "certify=direct", "images.first=4", "sampling.n0=64", "sampling.n=500")


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A classifier of clean 8x8 digits."""
    store = tmp_path_factory.mktemp("clean")
    return run_task("train", *PIXELS, "noise=none", *FIT, "train.epochs=2", f"store={store}")


@pytest.fixture(scope="module")
def files(clean, tmp_path_factory) -> dict[str, Path]:
    """A denoiser by each loss: of MSE alone, and before that classifier."""
    options = {"mse": ("denoising=mse",), "stability": ("denoising=stability", f"checkpoint={clean}")}
    return {name: denoise(*given, f"store={tmp_path_factory.mktemp(name)}") for name, given in options.items()}


def denoise(*more: str) -> Path:
    return run_task("denoise", *LEARN, *more)


def certify(clean: Path, file: Path | None, *more: str) -> Path:
    behind = () if file is None else ("denoiser=dncnn", *DNCNN, f"denoiser_checkpoint={file}")
    return run_task("certify", *CERTIFY, f"checkpoint={clean}", *behind, *more)


def weights(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def table(file: Path) -> dict[str, list[float]]:
    """The rows of denoiser.md."""
    lines = (file.parent / "denoiser.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["clean", "noisy", "denoised"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return {name: [float(cell) for cell in cells] for name, *cells in rows}


def fingerprint(store: Path) -> dict:
    return json.loads((store / "fingerprint.json").read_text())


def by_hand(clean: Path, file: Path) -> nn.Module:
    """The classifier behind a denoiser, put together without the command's own way."""
    network, denoiser = SmallCNN(1, 8, 10, [8, 16], 32), dncnn(1, 3, 8)
    load_weights(network, clean)
    denoiser.load_state_dict({key.removeprefix("denoiser."): value for key, value in weights(file).items()})
    return nn.Sequential(denoiser, network).eval()


# ---------------------------------------------------------------- the file


def test_what_is_written(files, clean):
    """The denoiser's weights and no classifier; beside them a table and a picture, and nothing of the running."""
    for name, file in files.items():
        names = {"denoiser.ckpt", "denoiser.md", "denoiser.png", "config.yaml", "fingerprint.json"}
        assert {path.name for path in file.parent.iterdir() if path.suffix != ".lock"} == names
        expected = dncnn(1, 3, 8).state_dict()
        assert {k: v.shape for k, v in weights(file).items()} == {f"denoiser.{k}": v.shape for k, v in expected.items()}
        assert (file.parent / "denoiser.png").read_bytes().startswith(b"\x89PNG")
        rows = table(file)
        assert rows["mean squared error of a pixel"][0] == 0
        assert ("accuracy of the classifier" in rows) is (name != "mse")
    assert any(not torch.equal(value, weights(files["stability"])[key]) for key, value in weights(files["mse"]).items())


def test_the_table_is_of_the_file(files, clean):
    """By other draws of the noise: errors within a few percent, as the noise's sigma squared is 9 percent."""
    data = data_module(compose("denoise", *NOISY)).split("val")
    x, y = torch.stack([data[i][0] for i in range(100)]), torch.tensor([data[i][1] for i in range(100)])
    x = (x * 255).round() / 255
    eps = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for name in ("mse", "stability"):
        denoiser, classifier = by_hand(clean, files[name])
        with torch.no_grad():
            denoised = denoiser(x + eps)
            accuracy = float((classifier(x).argmax(1) == y).double().mean())
        rows = table(files[name])
        for k, seen in ((1, x + eps), (2, denoised)):
            error = float((seen - x).square().mean())
            assert rows["mean squared error of a pixel"][k] == pytest.approx(error, rel=0.1)
        assert name == "mse" or rows["accuracy of the classifier"][0] == pytest.approx(accuracy, abs=1e-4)
    assert table(files["mse"])["mean squared error of a pixel"][2] < 0.06


def test_a_finished_run_is_not_repeated(files, clean, here):
    """Nor measured again; without its table it is measured, to the same numbers."""
    shutil.copytree(files["stability"].parent, here / "run")
    before = snapshot(here)
    arguments = (*LEARN, "denoising=stability", f"checkpoint={clean}", "store=run")
    ended = run_main("denoise", *arguments)
    assert (ended.code, ended.error) == (0, None), ended.err
    assert "already trained" in ended.out
    assert snapshot(here) == before
    (here / "run" / "denoiser.md").unlink(), (here / "run" / "denoiser.png").unlink()
    assert run_main("denoise", *arguments).code == 0
    assert table(here / "run" / "x") == table(files["stability"])


def cut(monkeypatch, here: Path, *more: str) -> Path:
    """A run whose power goes in the second epoch, and that is started again."""
    with monkeypatch.context() as patch:
        interrupt(patch, DenoiserModule, epoch=1)
        with pytest.raises(ZeroDivisionError):
            denoise(*more, "store=cut")
    assert (here / "cut" / "resume.ckpt").exists()
    return denoise(*more, "store=cut")


@pytest.mark.parametrize("averaged", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_weights(averaged, files, clean, here, monkeypatch):
    """Also to the same average of the weights, and the best epoch's."""
    more = ("denoising=stability", f"checkpoint={clean}")
    if averaged:
        more = ("denoising=mse", "train.ema=0.8", "train.patience=2", "train.limit_train_batches=3")
    resumed = cut(monkeypatch, here, *more)
    whole = denoise(*more, "store=whole") if averaged else files["stability"]
    assert weights(resumed).keys() == weights(whole).keys()
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key]), key
    assert table(resumed) == table(whole)
    assert not [path for path in (here / "cut").iterdir() if path.stem in ("resume", "best")]


def test_a_denoiser_goes_on_from_a_file(files, here):
    """With a learning rate of next to nothing its weights are the file's; without a file they are others."""
    still = ("train.optimizer.lr=1e-12", "train.optimizer.weight_decay=0", "train.limit_train_batches=1")
    file = denoise("denoising=mse", *still, f"denoiser_checkpoint={files['mse']}", "store=on")
    for key, value in weights(files["mse"]).items():
        if value.is_floating_point() and "running" not in key:
            torch.testing.assert_close(weights(file)[key], value, atol=1e-8, rtol=0)
    with pytest.raises(RequestError, match="start differs"):
        denoise("denoising=mse", *still, f"denoiser_checkpoint={files['stability']}", "store=on")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("noise.sigma=0.25", "noise"),
        ("denoiser.width=4", "denoiser"),
        ("train.epochs=3", "train"),
    ],
)
def test_what_counts_for_the_folder(files, change, key):
    with pytest.raises(RequestError, match=f"{key} differs"):
        denoise("denoising=mse", f"store={files['mse'].parent}", change)


# ---------------------------------------------------------------- certificates


@pytest.mark.parametrize("name", ["mse", "stability"])
def test_the_command_certifies_the_classifier_behind_the_denoiser(name, files, clean, here):
    """Records as by the Python API, with denoiser and classifier put together by hand."""
    found = records(certify(clean, files[name], "store=run"))
    cfg = compose("certify", *CERTIFY)
    smoothed = SmoothedClassifier(nn.Identity(), 10, noise=Gaussian(0.3))
    smoothed.base, _ = fused(by_hand(clean, files[name]), torch.rand(64, 1, 8, 8), "fx")
    data = data_module(cfg)
    given = [(i, data.image(i)) for i in range(4)]
    certificates = dict(AdditiveCertifier(FixedN(64, 500)).certify(smoothed.eval(), instantiate(cfg.threat), given))
    assert any(r["radius"] > 0 for r in found)
    for record in found:
        certificate = certificates[record["index"]]
        for key in ("prediction", "radius", "selection", "counts", "pa", "guarantee", "alpha", "n"):
            assert record[key] == getattr(certificate, key), key
        assert "base" not in record["details"]
    alone = records(certify(clean, None, "store=alone"))
    assert [r["counts"] for r in alone] != [r["counts"] for r in found]


def test_the_denoiser_is_part_of_the_run(files, clean, here):
    """Its bytes and its options; not where its file lies. Without it, or with another, the store is of another run."""
    copied = shutil.copy(files["mse"], here / "own.ckpt")
    store = certify(clean, Path(copied), "images.first=1", "store=run")
    before = timeless(store)
    certify(clean, files["mse"], "images.first=1", "store=run")
    assert timeless(store)["records.jsonl"] == before["records.jsonl"]
    for other in (files["stability"], None):
        with pytest.raises(RequestError, match="denoiser differs"):
            certify(clean, other, "images.first=1", "store=run")
    content = torch.load(copied, weights_only=True)
    content["epoch"] += 1
    torch.save(content, copied)
    with pytest.raises(RequestError, match="denoiser differs"):
        certify(clean, Path(copied), "images.first=1", "store=run")
    assert "denoiser" not in fingerprint(certify(clean, None, "images.first=1", "store=alone"))


def test_plain_state_dicts_serve_too(files, clean, here):
    state = {key.removeprefix("denoiser."): value for key, value in weights(files["mse"]).items()}
    torch.save(state, here / "plain.ckpt")
    first = records(certify(clean, files["mse"], "images.first=1", "store=first"))
    second = records(certify(clean, here / "plain.ckpt", "images.first=1", "store=second"))
    assert first[0]["counts"] == second[0]["counts"]


def test_every_command_has_the_same_network(files, clean):
    """What `trained_network` puts together: f(D(x)), of both files' weights."""
    x = torch.rand(5, 1, 8, 8)
    for command in ("attack", "corrupt"):
        options = ("denoiser=dncnn", *DNCNN, f"denoiser_checkpoint={files['mse']}", f"checkpoint={clean}")
        cfg = compose(command, *NOISY, *options)
        with torch.no_grad():
            torch.testing.assert_close(trained_network(cfg, command).eval()(x), by_hand(clean, files["mse"])(x))


def test_certificates_are_joined_with_an_attack_on_the_same_denoiser(files, clean, here):
    """Counts of contradictions; one on another denoiser, or on none, is refused. Votes are bounded again."""
    behind = ("denoiser=dncnn", *DNCNN, f"denoiser_checkpoint={files['mse']}")
    options = (*BRIGHTER, f"checkpoint={clean}", "images.first=2")
    few = ("certify=direct", "sampling.n0=64", "sampling.n=200")
    run_task("certify", *options, *behind, *few, "store=certified")
    gradient = ("attack=eot", "attack.steps=1", "attack.restarts=4", "attack.draws=2", "attack.n=32")
    run_task("attack", *options, *behind, *gradient, "store=attacked")
    run_task("attack", *options, "attack.k=4", "attack.n=32", "store=bare")
    other = (*behind[:-1], f"denoiser_checkpoint={files['stability']}")
    run_task("attack", *options, *other, "attack.k=4", "attack.n=32", "store=other")
    assert "attack (eot)" in show(["certified", "attacked"], out="there")
    again = with_other_bounds(load(Path("certified")), {"alpha": 0.1}, None).records
    for record, other in zip(records(here / "certified"), again, strict=True):
        assert (other["alpha"], other["counts"]) == (0.1, record["counts"])
        assert other["radius"] > record["radius"] or record["prediction"] == -1
    for unlike in ("bare", "other"):
        with pytest.raises(RequestError, match="denoiser differs"):
            show(["certified", unlike], out="there")


def test_sigma_is_learned_through_the_denoiser(files, clean, here):
    """Another size and accuracy than those of the classifier alone, in a folder of its own."""
    learn = (*NOISY, "learn.epochs=1", "learn.limit_train_batches=1", "maximise.n0=2", f"checkpoint={clean}")
    behind = ("denoiser=dncnn", *DNCNN, f"denoiser_checkpoint={files['mse']}")
    alone, through = run_task("sigma", *learn, "store=alone"), run_task("sigma", *learn, *behind, "store=through")
    tables = [(file.parent / "sigma.md").read_text() for file in (alone, through)]
    assert tables[0] != tables[1]
    with pytest.raises(RequestError, match="denoiser differs"):
        run_task("sigma", *learn, "store=through")
    certify(clean, files["mse"], f"learned={through}", "images.first=1", "store=certified")
    assert records(here / "certified")[0]["n"] == 500


def test_two_denoisers_are_compared_in_two_folders(files, clean, here):
    options = (*NOISY, f"checkpoint={clean}", "only=[direct]", "images.first=1", "sampling.n0=64", "sampling.n=200")
    for name in ("mse", "stability"):
        behind = ("denoiser=dncnn", *DNCNN, f"denoiser_checkpoint={files[name]}")
        ended = run_main("compare", *options, *behind)
        assert ended.code == 0, ended.err
    assert len(list((here / "runs").glob("compare-*"))) == 2


# ---------------------------------------------------------------- the unet, averages, learned noise


def test_a_unet_serves_as_well(clean, here):
    """Its error is below that of the noisy image; other widths than the file's are refused."""
    own = ("denoiser=unet", "denoiser.widths=[4,8]")
    file = run_task("denoise", *TRAIN, *own, "store=run")
    rows = table(file)["mean squared error of a pixel"]
    assert rows[2] < 0.9 * rows[1]
    given = (*CERTIFY, f"checkpoint={clean}", f"denoiser_checkpoint={file}", "images.first=1", "denoiser=unet")
    assert len(records(run_task("certify", *given, "denoiser.widths=[4,8]", "store=certified"))) == 1
    with pytest.raises(RequestError, match="has other shapes"):
        run_task("certify", *given, "denoiser.widths=[8,8]", "store=other")


def test_half_precision_trains(files, here):
    """In bfloat16, whose sums are good for two digits: weights in float32, near those of float32."""
    file = denoise("denoising=mse", "train.precision=bf16-mixed", "store=run")
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights(file).values())
    name = "mean squared error of a pixel"
    assert table(file)[name] == pytest.approx(table(files["mse"])[name], rel=0.1)


def test_what_a_denoiser_learns_is_the_noise_of_a_file(clean, here):
    """`learned` takes the place of `noise`: the error of the noisy image is the mean of its variances."""
    sigma = torch.linspace(0.05, 0.4, 64, dtype=torch.float64).view(1, 8, 8)
    torch.save({"noise": {"sigma": sigma, "factors": None}}, here / "sigma.ckpt")
    file = denoise("denoising=mse", "train.limit_train_batches=1", "learned=sigma.ckpt", "store=run")
    error = table(file)["mean squared error of a pixel"][1]
    assert error == pytest.approx(float(sigma.square().mean()), rel=0.2)


# ---------------------------------------------------------------- mistakes

BEHIND = (*CERTIFY, "checkpoint={clean}", "denoiser=dncnn", *DNCNN)
NOISELESS = (*PIXELS, *DNCNN)
MISTAKES = {
    "nothing to train": ("denoise", (*NOISY, "denoiser=none"), ("no denoiser to train", "denoiser=dncnn")),
    "no noise": ("denoise", (*NOISELESS, "noise=none"), ("takes off pixel noise", "noise=gaussian noise.sigma=")),
    "the noise of an experiment, left over": (
        "denoise", (*PLAIN, "experiment=mnist_denoised", "data=digits", "noise=none"), ("noise=gaussian",),
    ),
    "stability of nothing": ("denoise", (*NOISY, *DNCNN, "denoising=stability"), ("checkpoint=FILE", "denoising=mse")),
    "a missing classifier": ("denoise", (*NOISY, *DNCNN, "checkpoint=nosuch"), ("nosuch", "checkpoint=")),
    "a missing start": ("denoise", (*NOISY, *DNCNN, "denoiser_checkpoint=nosuch"), ("nosuch", "denoiser_checkpoint=")),
    "a classifier as start": (
        "denoise", (*NOISY, *DNCNN, "denoiser_checkpoint={clean}"), ("{clean}", "does not fit", "features.0.weight"),
    ),
    "a denoiser as classifier": (
        "denoise", (*NOISY, *DNCNN, "checkpoint={mse}"), ("{mse}", "does not fit", "denoiser.layers.0.weight"),
    ),
    "levels that do not halve": (
        "denoise", (*NOISY, "denoiser=unet", "denoiser.widths=[8,8,8,8,8]"), ("(1, 8, 8)", "sides its levels halve"),
    ),
    "too shallow": ("denoise", (*NOISY, "denoiser.depth=2"), ("denoiser.depth", "at least 3")),
    "an option too many": ("denoise", (*NOISY, "+denoiser.foo=1"), ("foo", "options of denoiser")),
    "training a classifier behind it": ("train", (*NOISY, "denoiser=dncnn"), ("leave denoiser out", "gsmooth denoise")),
    "the demo": ("demo", (*NOISY, "denoiser=dncnn"), ("leave denoiser out", "gsmooth denoise")),
    "no weights": ("certify", BEHIND, ("denoiser_checkpoint=FILE", "gsmooth denoise")),
    "weights that are not there": ("certify", (*BEHIND, "denoiser_checkpoint=nosuch"), ("nosuch", "gsmooth denoise")),
    "weights of another width": (
        "certify", (*BEHIND, "denoiser.width=4", "denoiser_checkpoint={mse}"), ("{mse}", "has other shapes"),
    ),
    "a classifier's weights": ("certify", (*BEHIND, "denoiser_checkpoint={clean}"), ("{clean}", "does not fit")),
    "a denoiser's weights as the classifier's": (
        "certify", (*CERTIFY, "checkpoint={mse}"), ("{mse}", "does not fit", "features.0.weight"),
    ),
    "text": ("certify", (*BEHIND, "denoiser_checkpoint={text}"), ("{text}", "weights_only")),
    "nan": ("certify", (*BEHIND, "denoiser_checkpoint={nan}"), ("{nan}", "NaN or infinite weights")),
    "weights without a denoiser": (
        "certify", (*CERTIFY, "checkpoint={clean}", "denoiser_checkpoint={mse}"), ("denoiser_checkpoint", "denoiser="),
    ),
    "no classifier": ("certify", (*CERTIFY, "denoiser=dncnn", "denoiser_checkpoint={mse}"), ("checkpoint=FILE",)),
    "a unet of images that do not halve": (
        "certify", (*CERTIFY, "checkpoint={clean}", "denoiser=unet", "denoiser.widths=[8,8,8,8,8]",
                    "denoiser_checkpoint={unet}"), ("model",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(files, clean, tmp_path_factory) -> dict[str, Path]:
    """Files of every kind."""
    folder = tmp_path_factory.mktemp("wrong")
    found = {"clean": clean, "mse": files["mse"]} | {name: folder / f"{name}.ckpt" for name in ("text", "nan", "unet")}
    found["text"].write_text("no weights\n")
    content = torch.load(files["mse"], weights_only=True)
    content["state_dict"]["denoiser.layers.0.bias"][0] = np.nan
    torch.save(content, found["nan"])
    torch.save(unet_denoiser(1, [8] * 5).state_dict(), found["unet"])
    return found


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, wrong, here):
    """One sentence that says what to change, exit status 2, and nothing written."""
    command, overrides, words = MISTAKES[case]
    given = [o.format(**wrong) if "checkpoint" in o else o for o in overrides]
    one_sentence(run_main(command, *given), *(word.format(**wrong) for word in words))
    assert snapshot(here) == {}


def test_sigma_says_what_is_missing(clean, here):
    ended = run_main("sigma", *NOISY, f"checkpoint={clean}", "denoiser=dncnn")
    one_sentence(ended, "a denoiser needs its weights")


@pytest.mark.parametrize("case", ["waveforms", "a single pixel to normalise"])
def test_what_no_denoiser_takes_is_one_sentence(case, here):
    layouts.speech(here, {"yes": layouts.SPEAKERS, "no": layouts.SPEAKERS})
    waves = (*QUIET, "data=speech_commands", "data.classes=2", "data.dataset.root=.", "threat=l2", "preprocess=none")
    options = {
        "waveforms": (*waves, "transform=identity", "law=none", *DNCNN),
        "a single pixel to normalise": (*NOISY, "denoiser=unet", "denoiser.widths=[4,4,4,4]"),
    }
    one_sentence(run_main("denoise", *options[case]), "the denoiser must return inputs of shape (1, ")


def test_leftovers_of_an_experiment_are_no_parts():
    """noise=none and denoiser=none beside an experiment's numbers: null, in the way that commands start; parts that are
    chosen stay."""
    cfg = compose("certify", "experiment=mnist_denoised", "denoiser=none", "noise=none")
    assert "sigma" in cfg.noise
    assert "depth" in cfg.denoiser
    found = without_leftovers(cfg)
    assert found.noise is None
    assert found.denoiser is None
    cfg = compose("certify", "experiment=mnist_denoised")
    assert without_leftovers(cfg.copy()) == cfg
    assert cfg.denoiser.depth == 5


def test_the_commands_in_the_experiments_header_work(here):
    """As far as the data, which are not here."""
    ended = run_main("train", "experiment=mnist_denoised", "denoiser=none", "noise=none", "data.dataset.root=nosuch")
    one_sentence(ended, "nosuch")
