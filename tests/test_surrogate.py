"""Networks that imitate a transformation: their parts, their training, their files, and the way to a certificate."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor

from conftest import (
    QUIET,
    compose,
    interrupt,
    one_sentence,
    records,
    run_main,
    run_task,
    save_surrogate,
    snapshot,
    timeless,
)
from gsmooth_lightning.attack.eot import losses
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import SurrogateModule
from gsmooth_lightning.model.unet import unet
from gsmooth_lightning.tasks.setup import data_module, smoothed_classifier
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.train import Imitation
from gsmooth_lightning.transform import Surrogate, ZoomBlur, compute, load_surrogate
from gsmooth_lightning.transform.surrogate import Decoded, decoded, directions, encoder

DIGITS = (*QUIET, "data.size=8", "data.enlarge=null", "threat=zoom_blur", "transform=zoom_blur", "threat.high=0.1")
NETWORK = ("network.widths=[8]", "network.hidden=16", "network.latent=8")
FIT = ("train.epochs=3", "train.batch_size=32", "train.optimizer.lr=1e-2")
LEARN = (*DIGITS, *NETWORK, *FIT)
"""A surrogate of 8x8 digits, in a second or two."""

LATENT = (*DIGITS, "model=latent", "preprocess=latent", "noise=latent", "law=none", "noise.sigma=0.2")
LATENT = (*LATENT, "noise.law.sigma=0.1", "model.classifier.widths=[8,16]", "model.classifier.hidden=32")
FEW = ("images.first=5", "sampling.n0=64", "sampling.n=500")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The file of a trained surrogate."""
    return run_task("surrogate", *LEARN, f"store={tmp_path_factory.mktemp('surrogate')}")


@pytest.fixture(scope="module")
def classifier(trained, tmp_path_factory) -> Path:
    """A classifier trained under its augmented noise."""
    store = tmp_path_factory.mktemp("classifier")
    return run_task("train", *LATENT, *FIT, f"surrogate={trained}", f"store={store}")


def small(seed=0, **options) -> Surrogate:
    """An untrained surrogate of two parameters, all its weights random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {"channels": 1, "size": 8, "latent": 4, "hidden": 8, "widths": [8]} | options
        found = Surrogate("drift", ["degrees", "share"], [-30, -0.5], [10, 2], **made)
        torch.nn.init.normal_(found.shift.bias)
    return found.eval().requires_grad_(False)


def images(n=6, size=8, seed=1) -> Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("widths", [[4], [8, 4], [4, 8, 12]])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 4)])
def test_a_unet_keeps_the_size(widths, height, width):
    """An image's output depends on no other image, and on its pixels far away, through the coarsest level."""
    network = unet(3, 5, widths)
    z = torch.randn(2, 3, height, width).requires_grad_()
    out = network(z)
    assert out.shape == (2, 5, height, width)
    (reach,) = torch.autograd.grad(out[0, :, 0, 0].sum(), z)
    assert reach[1].abs().max() == 0
    assert (reach[0, :, -1, -1].abs() > 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 10, "widths": [8, 8]}, "multiples of 4 pixels, and the images are 10x10"),
        ({"size": [8, 9]}, "multiples of 2 pixels, and the images are 8x9"),
        ({"widths": [6]}, "network.widths must hold the channels of each level, multiples of 4"),
        ({"widths": []}, "network.widths must hold the channels"),
        ({"widths": [8.0]}, "network.widths.0 must be a whole number"),
        ({"latent": 0}, "network.latent must be a whole number, at least 1"),
        ({"hidden": True}, "network.hidden must be a whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, words):
    with pytest.raises(RequestError, match=words):
        small(**options)


def test_tau_is_h_of_the_sum():
    """tau = H(F1 + F2); F1 = A1 xi + b1 with A1 in the parameters' own units, that saw shares of the range."""
    found, x = small(), images()
    xi = torch.tensor([[-30.0, 2], [10, 0], [0, -0.5], [0, 0], [3, 1], [-7, 0.25]])
    code = found.encoder(x)
    assert code.shape == (6, *found.shape) == (6, 4, 4, 4)
    by_hand = code + sum(xi[:, k, None, None, None] * found.directions[k] for k in range(2))
    by_hand = by_hand + found.shift.bias.view(found.shape)
    torch.testing.assert_close(found(x, xi), found.decoder(by_hand), atol=1e-5, rtol=1e-5)
    weights = found.shift.weight.T.view(2, *found.shape)
    torch.testing.assert_close(found.directions, weights / torch.tensor([30.0, 2]).view(2, 1, 1, 1))
    zero = torch.zeros(1, 2)
    for k in range(2):  # what one unit adds
        unit = torch.eye(2)[k : k + 1]
        added = found.parameters_code(unit) - found.parameters_code(zero)
        torch.testing.assert_close(added[0], found.directions[k], atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_refused():
    with pytest.raises(RequestError, match="of inputs of 1x8x8, and these are 1x28x28"):
        small().encoder(images(size=28))


def test_decoded_is_the_classifier_of_tau():
    """f(H(F2(x) + A1 xi + b1)) = f(tau(xi, x))."""
    found, x = small(), images()
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    xi = torch.tensor([[4.0, -0.3]]).expand(6, 2)
    seen = found.encoder(x) + torch.tensordot(xi, found.directions, 1)
    torch.testing.assert_close(Decoded(found, classifier)(seen), classifier(found(x, xi)), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the loss


def test_imitation_by_hand():
    """The mean error of a pixel; with a penalty, seen through noise, and the mean squared residual over sigma^2."""
    found, x, y = small(), images(), images(seed=2)
    xi = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    total = sum(float((a - b).abs().sum()) for a, b in zip(found(x, xi), y, strict=True))
    assert float(Imitation()(found, x, y, xi)) == pytest.approx(total / (6 * 64), rel=1e-5)
    torch.manual_seed(4)
    loss = float(Imitation(penalty=0.02, sigma=0.3)(found, x, y, xi))
    torch.manual_seed(4)
    latent = found.encoder(x) + found.parameters_code(xi)
    noisy = found.decoder(latent + 0.3 * torch.randn(latent.shape))
    away = [
        found.encoder(y[i : i + 1])
        - found.encoder(x[i : i + 1])
        - (xi[i, :, None, None, None] * found.directions).sum(0)
        for i in range(6)
    ]
    residual = sum(float((part**2).sum()) for part in away) / 6
    assert loss == pytest.approx(float((noisy - y).abs().mean()) + 0.02 * residual / 0.09, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"penalty": -1.0}, "imitation.penalty must be at least 0, got -1"),
        ({"penalty": "much"}, "imitation.penalty must be one number, got 'much'"),
        ({"sigma": 0.0}, "imitation.sigma must be positive"),
        ({"sigma": float("nan")}, "imitation.sigma must be"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(RequestError, match=words):
        Imitation(**options)


# ---------------------------------------------------------------- training


def table(file: Path) -> dict[str, list[float]]:
    """Rows of surrogate.md: the parameter -> mean error, worst error, residual."""
    rows = (file.parent / "surrogate.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["", "mean error", "worst error", "residual"]
    return {name: list(map(float, values)) for name, *values in cells[2:]}


def measured(surrogate: Surrogate, high: float, points: int = 9) -> dict[str, list[float]]:
    """The same from the definition, image by image and rounded like the table's numbers."""
    threat = TransformationThreat(ZoomBlur(), 0, high)
    inputs = data_module(compose("surrogate", *LEARN)).split("val")
    rows = {}
    for k in range(points):
        xi, errors, residuals = torch.tensor([[high * k / (points - 1)]]), [], []
        for i in range(len(inputs)):
            x = threat.prepare(inputs[i][0][None])
            y = compute(threat.transform, x, xi).clamp(0, 1)
            errors.append((surrogate(x, xi) - y).abs())
            moved = surrogate.encoder(y) - surrogate.encoder(x) - surrogate.directions[0] * xi[0, 0]
            residuals.append(float(moved.norm()))
        error = torch.stack(errors)
        rows[f"{float(xi):g} factor"] = [float(error.mean()), float(error.max()), sum(residuals) / len(residuals)]
    return rows


def test_training_imitates_and_is_measured(trained):
    """The table holds what the definition gives at the saved weights, row by row, and training has made it small: the
    first row is tau(0, x) against x."""
    found, fresh = load_surrogate(trained), load_surrogate(trained)
    cfg = compose("surrogate", *LEARN)
    torch.manual_seed(5)
    fresh = instantiate(cfg.network)("zoom blur", ["factor"], [0], [0.1]).eval().requires_grad_(False)
    written, by_hand, untrained = table(trained), measured(found, 0.1), measured(fresh, 0.1)
    assert next(iter(written)) == "0 factor"
    assert written.keys() == by_hand.keys()
    for name, row in written.items():
        assert row == pytest.approx(by_hand[name], abs=6e-3), name
        assert row[0] == pytest.approx(by_hand[name][0], abs=1e-4)
        assert row[0] < untrained[name][0] / 3
    assert (trained.parent / "surrogate.png").read_bytes().startswith(b"\x89PNG")
    assert not list(trained.parent.glob("resume*"))


def test_the_penalty_lowers_the_residual(trained, here):
    """Held against the noise that it is trained for, and against the spread of the latents themselves."""
    other = run_task("surrogate", *LEARN, "imitation=residual", "imitation.penalty=1e-2", "store=run")
    x = data_module(compose("surrogate", *LEARN)).split("val")
    x = torch.stack([x[i][0] for i in range(50)])
    share = {}
    for name, file in (("plain", trained), ("penalty", other)):
        code = load_surrogate(file).encoder(x)
        share[name] = max(row[2] for row in table(file).values()) / float(
            (code - code.mean(0)).flatten(1).norm(dim=1).mean()
        )
    assert share["penalty"] < share["plain"] / 2


def weights(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def test_an_interrupted_training_goes_on_to_the_same_weights(trained, here, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, SurrogateModule, epoch=1)
        with pytest.raises(ZeroDivisionError):
            run_task("surrogate", *LEARN, "store=cut")
    assert (here / "cut" / "resume.ckpt").exists()
    resumed = run_task("surrogate", *LEARN, "store=cut")
    assert weights(resumed).keys() == weights(trained).keys()
    assert all(torch.equal(value, weights(trained)[key]) for key, value in weights(resumed).items())
    assert table(resumed) == table(trained)


def test_a_table_that_was_not_written_is_written_later(trained, here):
    """After a kill between the weights and the table; a finished run is not measured again."""
    shutil.copytree(trained.parent, here / "run")
    (here / "run" / "surrogate.md").unlink(), (here / "run" / "surrogate.png").unlink()
    ended = run_main("surrogate", *LEARN, "store=run")
    assert (ended.code, ended.error) == (0, None), ended.err
    assert "already trained" in ended.out
    assert table(here / "run" / "x") == table(trained)
    before = snapshot(here)
    run_task("surrogate", *LEARN, "store=run")
    assert snapshot(here) == before


def test_the_table_is_of_the_weights_that_are_kept(here):
    """With patience the best epoch's; a learning rate far too large spoils the last."""
    options = [o for o in LEARN if not o.startswith("threat.high")]
    file = run_task("surrogate", *options, "threat.high=0.2", "train.patience=2", "train.optimizer.lr=0.5", "store=run")
    by_hand = measured(load_surrogate(file), 0.2)
    for name, row in table(file).items():
        assert row[0] == pytest.approx(by_hand[name][0], abs=1e-4)


# ---------------------------------------------------------------- files


def test_files_hold_the_surrogate(here):
    """Written and read with weights_only: the same function, frozen; its parts as the configuration names them."""
    found, x = small(), images()
    save_surrogate(found, here / "s.ckpt")
    again = load_surrogate("s.ckpt")
    xi = torch.tensor([[3.0, 0.1]]).expand(6, 2)
    assert torch.equal(again(x, xi), found(x, xi))
    assert (again.trained_on, again.units, again.name) == (found.trained_on, found.units, found.name)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(encoder("s.ckpt")(x), found.encoder(x))
    assert torch.equal(directions("s.ckpt"), found.directions)
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    z = found.encoder(x)
    assert torch.equal(decoded("s.ckpt", flat)(z), Decoded(found, flat)(z))


def test_the_command_writes_such_a_file(trained):
    content = torch.load(trained, weights_only=True)
    assert content["hyper_parameters"]["surrogate"] == load_surrogate(trained).trained_on
    assert load_surrogate(trained).trained_on == {
        "of": "zoom blur", "units": ["factor"], "lows": [0.0], "highs": [0.1],
        "channels": 1, "size": 8, "latent": 8, "hidden": 16, "widths": [8],
    }  # fmt: skip


def corrupt(kind: str, file: Path, checkpoint: Path) -> None:
    """Writes what is no surrogate."""
    if kind == "text":
        file.write_text("no weights\n")
    elif kind == "cut":
        save_surrogate(small(), file)
        file.write_bytes(file.read_bytes()[:3000])
    elif kind == "classifier":
        shutil.copy(checkpoint, file)
    elif kind == "state dict alone":
        torch.save(small().state_dict(), file)
    elif kind == "another network":
        save_surrogate(small(), file)
        content = torch.load(file, weights_only=True)
        content["hyper_parameters"]["surrogate"]["latent"] = 8
        torch.save(content, file)
    elif kind in ("nan", "inf"):
        found = copy.deepcopy(small())
        found.shift.bias[3] = float(kind)
        save_surrogate(found, file)
    elif kind == "folder":
        file.mkdir()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "there is no surrogate at own.ckpt"),
        ("folder", "there is no surrogate at own.ckpt"),
        ("text", "own.ckpt is not a surrogate"),
        ("cut", "own.ckpt is not a surrogate"),
        ("classifier", "own.ckpt is no surrogate"),
        ("state dict alone", "own.ckpt is no surrogate"),
        ("another network", "own.ckpt is no surrogate"),
        ("nan", "holds NaN or infinite weights; train the surrogate again"),
        ("inf", "holds NaN or infinite weights; train the surrogate again"),
    ],
)
def test_other_files_are_refused(kind, words, here, checkpoint):
    corrupt(kind, here / "own.ckpt", checkpoint)
    with pytest.raises(RequestError, match=words):
        load_surrogate("own.ckpt")


# ---------------------------------------------------------------- the way to a certificate


def certify(trained: Path, classifier: Path, *more: str) -> Path:
    given = (f"surrogate={trained}", f"checkpoint={classifier}", *FEW, "certify=latent")
    return run_task("certify", *LATENT, *given, *more)


def bounds(trained: Path, *more: str) -> Path:
    return run_task("bound", *LATENT, *FEW, f"surrogate={trained}", "error=latent", "error.tolerance=0.5", *more)


def test_the_way_to_a_certificate(trained, classifier, here):
    """surrogate, train, bound, certify, report; bounds that are stored, and a run that is resumed, change nothing."""
    bounds(trained, "store=bounds")
    real = ("error=latent", "error.tolerance=0.5")
    certify(trained, classifier, *real, "store=direct")
    certify(trained, classifier, *real, "store=reused", "images.first=2", "bounds=bounds")
    certify(trained, classifier, *real, "store=reused", "bounds=bounds")
    assert timeless(here / "reused")["records.jsonl"] == timeless(here / "direct")["records.jsonl"]
    certify(trained, classifier, "error=corollary", "store=corollary")
    found = records(here / "direct")
    assert [r["guarantee"] for r in found] == ["sound"] * 5
    assert any(r["prediction"] == r["label"] and 0 < r["radius"] <= 0.1 for r in found)
    assert {r["unit"] for r in found} == {"factor"}
    assert all(r["details"]["curve"][0][0] == 0 for r in found)
    table = run_main("report", "stores=[direct,corollary]", "out=there")
    assert (table.code, table.error) == (0, None), table.err
    text = (here / "there" / "report.md").read_text()
    for words in ("certified at 0.1 factor", "sound: holds for every attack", "heuristic: a hypothesis"):
        assert words in text


def test_stored_bounds_of_another_surrogate_are_refused(trained, classifier, here):
    """A surrogate with the same parts but other weights is another encoder."""
    other = load_surrogate(trained)
    other.encoder[0].weight[0, 0, 0, 0] += 1e-3
    save_surrogate(other, here / "other.ckpt")
    bounds(here / "other.ckpt", "store=bounds", "images.first=1")
    before = snapshot(here)
    with pytest.raises(RequestError, match="made for another preprocess"):
        certify(trained, classifier, "error=latent", "error.tolerance=0.5", "bounds=bounds", "store=run")
    assert snapshot(here) == before


def test_the_decoder_is_not_trained(trained, classifier, here):
    """H and b1 stay as they were, also as averages of the weights; the classifier behind them moves."""
    averaged = run_task(
        "train", *LATENT, *FIT, "train.ema=0.8", "train.epochs=1", f"surrogate={trained}", "store=averaged"
    )
    own = load_surrogate(trained)
    start = instantiate(compose("train", *LATENT, f"surrogate={trained}").model).classifier.state_dict()
    for file in (classifier, averaged):
        saved = weights(file)
        assert torch.equal(saved["smoothed.base.shift"], own.shift.bias.view(own.shape))
        for key, value in own.decoder.state_dict().items():
            assert torch.equal(saved[f"smoothed.base.decoder.{key}"], value), key
        assert any(not torch.equal(saved[f"smoothed.base.classifier.{key}"], value) for key, value in start.items())


def test_where_the_file_lies_does_not_count(trained, classifier, here):
    """A run's identity holds the surrogate's bytes, not its name."""
    (here / "elsewhere").mkdir()
    moved = shutil.copy(trained, here / "elsewhere" / "own.ckpt")
    options = ("error=latent", "error.tolerance=0.5", "images.first=1")
    first = certify(trained, classifier, *options)
    before = timeless(first)
    assert certify(Path(moved), classifier, *options) == first
    assert {**timeless(first), "config.yaml": b""} == {**before, "config.yaml": b""}
    content = torch.load(trained, weights_only=True)
    content["epoch"] += 1
    torch.save(content, moved)
    other = certify(Path(moved), classifier, *options)
    assert other != first
    fingerprints = [json.loads((store / "fingerprint.json").read_text()) for store in (first, other)]
    assert fingerprints[0] != fingerprints[1]
    assert records(other)[0]["counts"] == records(first)[0]["counts"]


@pytest.mark.parametrize(
    "attack",
    [
        ("attack=worst_of_k", "attack.k=4"),
        ("attack=grid", "attack.points=3"),
        ("attack=eot", "attack.steps=2", "attack.restarts=4", "attack.draws=4"),
    ],
)
def test_attacks_reach_through_the_encoder(attack, trained, classifier, here):
    given = (f"surrogate={trained}", f"checkpoint={classifier}", "images.first=2", "store=run")
    run_task("attack", *LATENT, *attack, "attack.n=32", *given)
    found = records(here / "run")
    assert len(found) == 2
    assert all(0 <= max(r["distances"]) <= 0.1 + 1e-6 for r in found)


def test_the_gradient_of_the_attack_is_the_losses_slope(trained, classifier):
    """Autograd through the encoder, latent noise and H, against a difference."""
    cfg = compose("attack", *LATENT, f"surrogate={trained}", "threat.saved=float")
    smoothed, threat = smoothed_classifier(cfg, instantiate(cfg.model)).eval(), instantiate(cfg.threat)
    state = {k.removeprefix("smoothed.base."): v for k, v in weights(classifier).items() if "smoothed.base." in k}
    smoothed.base.load_state_dict(state)
    x = threat.prepare(data_module(cfg).split("test")[0][0][None])[0]
    noise = 0.3 * torch.randn(8, *smoothed.encoded_shape(x), generator=torch.Generator().manual_seed(6))

    def loss(gamma: Tensor) -> Tensor:
        return losses(smoothed, threat, x, 3, gamma, torch.zeros(8, 0), noise).sum()

    gamma, step = torch.tensor([[0.04]], requires_grad=True), 2e-3
    (slope,) = torch.autograd.grad(loss(gamma), gamma)
    with torch.no_grad():
        difference = (loss(gamma + step) - loss(gamma - step)) / (2 * step)
    assert abs(float(difference)) > 1e-2
    assert float(slope) == pytest.approx(float(difference), rel=0.05)


# ---------------------------------------------------------------- mistakes

GIVEN = (*LATENT, "surrogate={trained}", *FEW)
CERTIFY = (*GIVEN, "checkpoint={classifier}", "certify=latent")
MISTAKES = {
    "a surrogate of pixels' noise": ("surrogate", (*QUIET, "threat=l2"), ("imitates a transformation", "threat=")),
    "levels that do not halve": ("surrogate", (*LEARN, "network.widths=[8,8,8,8]"), ("network.widths", "16", "8x8")),
    "images of another size": ("surrogate", (*LEARN, "data.size=28"), ("1x28x28", "1x8x8", "data.size")),
    "widths no groups divide": ("surrogate", (*LEARN, "network.widths=[6]"), ("network.widths", "multiples of 4")),
    "an option too many": ("surrogate", (*LEARN, "+network.foo=3"), ("foo", "options of network")),
    "a negative penalty": ("surrogate", (*LEARN, "imitation.penalty=-1"), ("imitation.penalty", "-1")),
    "no surrogate": ("train", LATENT, ("surrogate=FILE", "gsmooth surrogate")),
    "a missing one": ("train", (*LATENT, "surrogate=nosuch"), ("nosuch", "surrogate=")),
    "a classifier's file": ("train", (*LATENT, "surrogate={classifier}"), ("is no surrogate", "gsmooth surrogate")),
    "images as latents": ("train", (*GIVEN, "preprocess=none"), ("preprocess=latent", "model=latent")),
    "a law left on": ("train", (*GIVEN, "law=gaussian"), ("law=none", "zoom blur")),
    "bounds under other noise": ("bound", (*GIVEN, "error=latent", "noise=gaussian"), ("noise=latent",)),
    "the joint certificate": ("certify", (*CERTIFY, "error=latent", "certify=joint"), ("error=latent", "error=image")),
    "a defect's bound": ("certify", (*CERTIFY, "error=image"), ("error=latent",)),
    "other noise": ("certify", (*CERTIFY, "error=latent", "noise=gaussian"), ("noise=latent",)),
    "a law": ("certify", (*CERTIFY, "error=latent", "law=gaussian"), ("law=none",)),
    "pixel threats": ("certify", (*CERTIFY, "error=latent", "threat=l2"), ("certify=direct",)),
    "beyond the training": (
        "certify", (*CERTIFY, "error=latent_surrogate", "threat.high=0.2"), ("0.1", "narrow the threat"),
    ),
    "another transformation": (
        "certify", (*CERTIFY, "error=corollary", "threat=rotation", "transform=rotation"), ("zoom blur", "rotation"),
    ),
    "two surrogates": ("certify", (*CERTIFY, "error=latent", "surrogate={other}"), ("another surrogate", "surrogate=")),
    "two surrogates, the noise": (
        "certify", (*CERTIFY, "error=latent_surrogate", "noise.directions.file={other}"), ("another surrogate",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, trained, classifier, here, tmp_path):
    """One sentence that says what to change, exit status 2, and nothing written."""
    command, overrides, words = MISTAKES[case]
    other = tmp_path / "other.ckpt"
    if "{other}" in "".join(overrides):
        changed = load_surrogate(trained)
        changed.shift.bias[0] += 1
        changed.shift.weight[0] += 1
        save_surrogate(changed, other)
    files = {"trained": trained, "classifier": classifier, "other": other}
    given = [o.format(**files) if o.startswith(("surrogate", "checkpoint", "noise.d")) else o for o in overrides]
    for group in ("noise", "threat"):  # options of one that is replaced
        if sum(o.startswith(f"{group}=") for o in given) > 1:
            given = [o for o in given if not o.startswith(f"{group}.")]
    one_sentence(run_main(command, *given), *words)
    assert snapshot(here) == {}
