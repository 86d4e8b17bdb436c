"""Denoisers: their networks, their losses by hand, the closed form of a linear one, and the Lightning module."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conftest import compose
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.lit import DenoiserModule
from gsmooth_lightning.model import BlackBox, Residual, dncnn, unet_denoiser
from gsmooth_lightning.model.unet import unet
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.train import DenoisingMSE, DenoisingStability
from gsmooth_lightning.transform import Rotation
from objectives import CLASSES, SHAPE, Seen, network_with_statistics

SGD = torch.optim.SGD
V, SIGMA, MEAN = 0.3, 0.5, 0.7
"""Variance and mean of the images, and the noise, of the closed form."""


class Line(nn.Module):
    """D(x) = a x + b."""

    def __init__(self, a: float = 0.5, b: float = 0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x + self.b


def linear(seed: int = 0) -> nn.Module:
    """A linear softmax classifier of SHAPE."""
    base = nn.Sequential(nn.Flatten(), nn.Linear(6, CLASSES))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        base[1].weight.copy_(torch.randn(CLASSES, 6, generator=generator))
        base[1].bias.copy_(torch.randn(CLASSES, generator=generator))
    return base


def images(n: int, seed: int = 1) -> Tensor:
    """In [0, 1], as they are saved in 8 bits."""
    return torch.randint(0, 256, (n, *SHAPE), generator=torch.Generator().manual_seed(seed)) / 255


def noise(n: int, seed: int = 2) -> Tensor:
    return 0.5 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def module(base=None, denoiser=None, denoising=None, smoothed=None, optimizer=None) -> DenoiserModule:
    """Around images of SHAPE under a sigma of .5."""
    smoothed = smoothed or SmoothedClassifier(linear() if base is None else base, CLASSES, noise=Gaussian(0.5))
    threat = instantiate(compose("denoise", "threat=l2", "data.enlarge=null").threat)
    made = (denoiser or Line(), denoising or DenoisingMSE())
    return DenoiserModule(smoothed, threat, *made, optimizer or (lambda parameters: SGD(parameters, 0.1)))


def batches(x: Tensor, y: Tensor, size: int) -> DataLoader:
    return DataLoader([(x[i], int(y[i]), i) for i in range(len(x))], batch_size=size)


def trainer(**options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return Trainer(**quiet, enable_model_summary=False, **options)


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize(("channels", "depth", "width"), [(1, 3, 2), (3, 5, 4), (1, 17, 64)])
def test_dncnn_has_the_layers_of_the_paper(channels, depth, width):
    """`depth` convolutions of 3 x 3, normalisation behind all but the first and the last, ReLU behind all but the last:
    9 c w + w, then depth - 2 times 9 w^2 + 2 w, then 9 w c + c weights."""
    made = dncnn(channels, depth, width)
    kinds = [type(layer) for layer in made.layers]
    inside = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * (depth - 2)
    assert kinds == [nn.Conv2d, nn.ReLU, *inside, nn.Conv2d]
    expected = 9 * channels * width + width + (depth - 2) * (9 * width**2 + 2 * width) + 9 * width * channels + channels
    assert sum(p.numel() for p in made.parameters()) == expected


def test_dncnn_sees_one_pixel_more_each_way_a_layer():
    """With positive weights the derivative of a pixel is not 0 within `depth` pixels, and 0 beyond."""
    made = dncnn(1, 3, 2).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(0.1)
    x = torch.rand(1, 1, 11, 9).requires_grad_()
    (reach,) = torch.autograd.grad(made.layers(x)[0, 0, 5, 4], x)
    inside = torch.zeros(11, 9, dtype=torch.bool)
    inside[2:9, 1:8] = True
    assert torch.equal(reach[0, 0] > 0, inside)
    assert (reach[0, 0][~inside] == 0).all()


@pytest.mark.parametrize("make", [dncnn, unet_denoiser])
def test_denoisers_are_x_less_the_noise(make):
    """D(x) = x - R(x): a last layer of zeros leaves images alone, one of a constant takes that off."""
    made = make(2).eval()
    x = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made(x), x - made.layers(x), atol=0, rtol=0)
    last = made.layers[-1]
    assert isinstance(last, nn.Conv2d)
    assert (made(x) - x).abs().max() > 0
    with torch.no_grad():
        last.weight.zero_(), last.bias.copy_(torch.tensor([0.0, 0.25]))
    torch.testing.assert_close(made(x), x - torch.tensor([0, 0.25]).view(2, 1, 1), atol=0, rtol=0)


def test_residual_is_of_any_layers():
    x = torch.rand(2, 1, 3, 3)
    torch.testing.assert_close(Residual(nn.Identity())(x), torch.zeros_like(x))
    torch.testing.assert_close(Residual(Line(0.25, 1.0))(x), 0.75 * x - 1)


@pytest.mark.parametrize(
    ("made", "size"), [(dncnn(1, 3, 4), (5, 7)), (dncnn(3, 4, 2), (1, 1)), (unet_denoiser(1, [4, 8]), (6, 2))]
)
def test_an_image_is_denoised_by_itself_and_keeps_its_size(made, size):
    """In evaluation: another image in the block changes nothing."""
    made.eval()
    channels = next(made.parameters()).shape[1]
    x = torch.rand(2, channels, *size).requires_grad_()
    out = made(x)
    assert out.shape == x.shape
    (reach,) = torch.autograd.grad(out[0].sum(), x)
    assert reach[1].abs().max() == 0
    assert reach[0].abs().max() > 0


def test_the_unets_denoiser_is_the_unet():
    """The same weights by name, from image to image."""
    made, plain = unet_denoiser(3, [4, 8]), unet(3, 3, [4, 8])
    plain.load_state_dict(made.layers.state_dict())
    x = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(made(x), x - plain(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dncnn(0), "denoiser.channels must be a whole number, at least 1, got 0"),
        (lambda: dncnn(1.5), "denoiser.channels must be a whole number"),
        (lambda: dncnn(1, 2), "denoiser.depth must be a whole number, at least 3, got 2"),
        (lambda: dncnn(1, 3, True), "denoiser.width must be a whole number, at least 1, got True"),
        (lambda: unet_denoiser(1, []), "widths must hold the channels of each level"),
        (lambda: unet_denoiser(1, [6]), "widths must hold the channels of each level, multiples of 4"),
    ],
)
def test_networks_that_are_none_are_refused(make, words):
    with pytest.raises(RequestError, match=words):
        make()


@pytest.mark.parametrize("make", [lambda: unet_denoiser(1, [6]), lambda: unet_denoiser(0, [4])])
def test_a_unet_denoiser_is_refused_by_its_own_options(make):
    with pytest.raises(RequestError, match=r"denoiser\."):
        make()


# ---------------------------------------------------------------- losses by hand


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def logits_of(base: nn.Module, x: np.ndarray) -> np.ndarray:
    """Of the linear classifier, in float64."""
    weight, bias = (p.detach().double().numpy() for p in (base[1].weight, base[1].bias))
    return x.reshape(len(x), -1) @ weight.T + bias


def test_mse_is_the_mean_over_images_and_pixels():
    """1 / (n D) sum ||a (x + eps) + b - x||^2, without a classifier."""
    x, eps = images(4), noise(4)
    loss = DenoisingMSE()(Line(0.6, 0.1), None, x, x + eps)
    by_hand = np.mean((0.6 * (x + eps).double().numpy() + 0.1 - x.double().numpy()) ** 2)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert DenoisingMSE()(nn.Identity(), None, x, x + eps).item() == pytest.approx(float(eps.square().mean()), rel=1e-5)


def test_mse_asks_no_classifier():
    base, x = linear(), images(4)
    seen = Seen(base)
    DenoisingMSE()(Line(), base, x, x + noise(4))
    assert not seen


def test_stability_is_the_cross_entropy_to_the_clean_answer():
    """-1/n sum log softmax(f(a (x + eps) + b))_c, c = argmax f(x): by hand in float64. The labels of the data, and what
    the classifier says of the noisy image, play no part."""
    base, x, eps = linear(), images(40), 3 * noise(40)
    clean, noisy = x.double().numpy(), (x + eps).double().numpy()
    answer = logits_of(base, clean).argmax(1)
    p = softmax(logits_of(base, 0.6 * noisy + 0.1))
    assert (answer != p.argmax(1)).any()
    assert (answer != logits_of(base, noisy).argmax(1)).any()
    loss = DenoisingStability()(Line(0.6, 0.1), base, x, x + eps)
    assert loss.item() == pytest.approx(-np.log(p[np.arange(40), answer]).mean(), rel=1e-5)


def test_the_gradient_of_stability_is_the_slope():
    """d/da and d/db by autograd, against central differences in float64; none of it moves the classifier."""
    base, line = linear().double().requires_grad_(False), Line(0.6, 0.1).double()
    x, eps = images(8).double(), noise(8).double()
    loss = DenoisingStability()(line, base, x, x + eps)
    for p, slope in zip(line.parameters(), torch.autograd.grad(loss, list(line.parameters())), strict=True):
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                p += step
                ends.append(float(DenoisingStability()(line, base, x, x + eps)))
            p += 1e-5
        assert abs(float(slope)) > 1e-3
        assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("base", [None, BlackBox(lambda x: [0] * len(x))], ids=["none", "labels"])
def test_stability_needs_a_classifier_with_gradients(base):
    with pytest.raises(RequestError, match="denoising=stability needs a classifier with gradients"):
        DenoisingStability()(Line(), base, images(2), images(2))


# ---------------------------------------------------------------- the closed form


def gaussian_problem() -> tuple[Tensor, Tensor]:
    """(x, eps): Gaussian images and noise whose moments are exactly those of their laws: means MEAN and 0, variances V
    and SIGMA^2, uncorrelated (columns of Q in a QR decomposition that starts with a column of ones)."""
    draws = torch.randn(4 * 600, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.cat([torch.ones(len(draws), 1, dtype=torch.float64), draws], 1))
    unit = (q[:, 1:] * len(draws) ** 0.5).T.reshape(2, 600, 1, 2, 2)
    return MEAN + V**0.5 * unit[0], SIGMA * unit[1]


def loss_of(a: float, b: float) -> tuple[float, Line]:
    """The squared error of D(x) = a x + b on that problem, with its gradient in the denoiser."""
    line, (x, eps) = Line(a, b).double(), gaussian_problem()
    loss = DenoisingMSE()(line, None, x, x + eps)
    loss.backward()
    return loss.item(), line


OPTIMUM = V / (V + SIGMA**2)


def test_a_linear_denoiser_is_wieners():
    """E (a (x + eps) + b - x)^2 = (a - 1)^2 v + a^2 sigma^2 + ((a - 1) m + b)^2 has its minimum, v sigma^2 / (v +
    sigma^2), at a = v / (v + sigma^2), b = (1 - a) m: the gradient is 0 there and nowhere else."""
    least, line = loss_of(OPTIMUM, (1 - OPTIMUM) * MEAN)
    assert least == pytest.approx(V * SIGMA**2 / (V + SIGMA**2), rel=1e-6)
    assert abs(line.a.grad) < 1e-7
    assert abs(line.b.grad) < 1e-7
    for a, b in ((OPTIMUM + 0.1, (1 - OPTIMUM) * MEAN), (OPTIMUM, 0.0), (1.0, 0.0), (0.0, MEAN)):
        loss, line = loss_of(a, b)
        off = (a - 1) * MEAN + b
        assert loss == pytest.approx((a - 1) ** 2 * V + a**2 * SIGMA**2 + off**2, rel=1e-6)
        by_hand = 2 * (a - 1) * V + 2 * a * SIGMA**2 + 2 * MEAN * off
        assert line.a.grad.item() == pytest.approx(by_hand, abs=1e-6)
        assert line.b.grad.item() == pytest.approx(2 * off, abs=1e-6)
        assert loss > least


def test_gradient_descent_ends_there():
    x, eps = gaussian_problem()
    line = Line(1.0, 0.0).double()
    optimizer = torch.optim.LBFGS(line.parameters(), max_iter=50, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = DenoisingMSE()(line, None, x, x + eps)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert line.a.item() == pytest.approx(OPTIMUM, abs=1e-6)
    assert line.b.item() == pytest.approx((1 - OPTIMUM) * MEAN, abs=1e-6)


# ---------------------------------------------------------------- the module


def known(monkeypatch, made: DenoiserModule, draws: list[Tensor]) -> list[Tensor]:
    """Replaces the noise by these draws in turn; returns what they were asked for."""
    supply, asked = iter(draws), []

    def training_noise(x: Tensor) -> Tensor:
        asked.append(x)
        return next(supply)

    monkeypatch.setattr(made.smoothed, "training_noise", training_noise)
    return asked


@pytest.mark.parametrize("kind", ["mse", "stability"])
def test_a_step_is_the_loss_at_one_draw(monkeypatch, kind):
    """Its labels do not count; it runs in float32 on images as they are saved."""
    base, x, eps = linear(), images(5), noise(5)
    made = module(base, Line(0.6, 0.1), DenoisingMSE() if kind == "mse" else DenoisingStability())
    monkeypatch.setattr(made, "log", lambda *_, **__: None)
    losses = []
    for labels in (torch.zeros(5), torch.ones(5)):
        asked = known(monkeypatch, made, [eps])
        losses.append(made.training_step((x, labels, torch.arange(5)), 0).item())
        assert torch.equal(asked[0], x)
    assert losses[0] == losses[1]
    seen = 0.6 * (x + eps).double().numpy() + 0.1
    by_hand = np.mean((seen - x.double().numpy()) ** 2)
    if kind == "stability":
        answer = logits_of(base, x.double().numpy()).argmax(1)
        by_hand = -np.log(softmax(logits_of(base, seen))[np.arange(5), answer]).mean()
    assert losses[0] == pytest.approx(by_hand, rel=1e-5)


def test_the_noise_is_that_of_the_law():
    """Of 60000 values: mean and sigma within five standard errors; fresh in each call."""
    made, x = module(), images(10000)
    (clean, noisy), (_, again) = made.pair((x, None, None)), made.pair((x, None, None))
    assert torch.equal(clean, x)
    eps = noisy - clean
    assert abs(eps.mean()) < 5 * 0.5 / 60000**0.5
    assert abs(eps.std() - 0.5) < 5 * 0.5 / (2 * 60000) ** 0.5
    assert (eps != again - clean).any()


def test_both_images_of_a_pair_have_one_transformation_and_the_preprocessing(monkeypatch):
    """clean = preprocess(psi(x, theta)), and the noise, shaped like that, is added behind."""
    smoothed = SmoothedClassifier(linear(), CLASSES, Rotation(), nn.AvgPool2d(2), Gaussian(20.0), Gaussian(0.5))
    made = module(smoothed=smoothed)
    angles = torch.tensor([[10.0], [-25.0]])
    monkeypatch.setattr(smoothed, "draw_parameters", lambda source, n: angles[:n])
    eps = torch.randn(2, 1, 3, 3)
    known(monkeypatch, made, [eps])
    x = torch.randint(0, 256, (2, 1, 6, 6)) / 255
    clean, noisy = made.pair((x, None, None))
    torch.testing.assert_close(clean, nn.AvgPool2d(2)(Rotation()(x, angles)))
    torch.testing.assert_close(noisy - clean, eps)


def convolutional() -> nn.Module:
    """A denoiser of SHAPE with batch statistics."""
    torch.manual_seed(1)
    return dncnn(1, 3, 2)


@pytest.mark.parametrize("denoising", [DenoisingMSE, DenoisingStability])
def test_training_moves_the_denoiser_alone(denoising):
    """All its weights and statistics; of the classifier neither, not even its dropout's draws: it is in evaluation mode
    in every step, the denoiser in training mode in those of training and in evaluation in those of validation."""
    base, denoiser = network_with_statistics(), convolutional()
    base[1].running_mean.fill_(0.3)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    first = {key: value.clone() for key, value in denoiser.state_dict().items()}
    made = module(base, denoiser, denoising())
    of_base, of_denoiser = Seen(base), Seen(denoiser)
    data = batches(images(12), torch.arange(12) % CLASSES, 4)
    trainer(max_epochs=2, num_sanity_val_steps=1).fit(made, data, data)
    for key, value in base.state_dict().items():
        assert torch.equal(value, before[key]), key
    for key, value in denoiser.state_dict().items():
        assert not torch.equal(value, first[key]), key
    assert denoiser.layers[3].num_batches_tracked == 6
    assert of_base
    assert not any(training or wants for _, training, wants in of_base)
    assert all(p.grad is None for p in base.parameters())
    assert not any(part.training for part in base.modules())
    # a step of training is one pass; one of validation two: of its loss, and of its measure
    modes = [training for _, training, _ in of_denoiser]
    epoch = [True] * 3 + [False] * 6
    assert modes == [False] * 2 + epoch * 2


def test_the_optimizer_gets_the_denoiser():
    """All of it that is to be trained, and nothing of the classifier."""
    denoiser = convolutional()
    denoiser.layers[0].bias.requires_grad_(False)
    optimizer = module(network_with_statistics(), denoiser).configure_optimizers()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in denoiser.parameters()} - {id(denoiser.layers[0].bias)}


def test_the_checkpoint_holds_the_denoiser_alone(tmp_path):
    """Named denoiser.*, its statistics with it; it comes back beside any classifier, which stays as it was."""
    made = module(network_with_statistics(), convolutional())
    own = trainer(max_epochs=1)
    own.fit(made, batches(images(8), torch.zeros(8), 4))
    own.save_checkpoint(tmp_path / "denoiser.ckpt", weights_only=True)
    state = torch.load(tmp_path / "denoiser.ckpt", weights_only=True)["state_dict"]
    assert {key: value.shape for key, value in state.items()} == {
        f"denoiser.{key}": value.shape for key, value in made.denoiser.state_dict().items()
    }
    other = module(linear(5), dncnn(1, 3, 2))
    data = batches(images(8), torch.zeros(8), 4)
    trainer().validate(other, data, ckpt_path=tmp_path / "denoiser.ckpt", verbose=False, weights_only=True)
    for key, value in other.denoiser.state_dict().items():
        assert torch.equal(value, made.denoiser.state_dict()[key]), key
    assert torch.equal(other.smoothed.base[1].weight, linear(5)[1].weight)


def test_what_is_measured(monkeypatch):
    """By hand, over 7 images in batches of 4 and 3: squared errors of pixels and the classifier's hits, weighted by
    images; the loss of them all."""
    base, x, eps = linear(), images(7), noise(7)
    y = logits_of(base, x.double().numpy()).argmax(1)
    y[:2] = (y[:2] + 1) % CLASSES  # two are wrong from the start
    made = module(base, Line(0.6, 0.1), DenoisingStability())
    known(monkeypatch, made, [eps[:4], eps[4:]])
    own = trainer()
    (logged,) = own.validate(made, batches(x, y, 4), verbose=False)
    clean, noisy = x.double().numpy(), (x + eps).double().numpy()
    shown = {"clean": clean, "noisy": noisy, "denoised": 0.6 * noisy + 0.1}
    assert list(made.measured) == list(shown)
    hits = {}
    for kind, seen in shown.items():
        hits[kind] = (logits_of(base, seen).argmax(1) == y).mean()
        assert made.measured[kind]["mean squared error of a pixel"] == f"{np.mean((seen - clean) ** 2):.4f}"
        assert made.measured[kind]["accuracy of the classifier"] == f"{hits[kind]:.4f}"
    assert made.measured["clean"]["mean squared error of a pixel"] == "0.0000"
    assert hits["clean"] == pytest.approx(5 / 7)
    answer = logits_of(base, clean).argmax(1)
    losses = -np.log(softmax(logits_of(base, shown["denoised"]))[np.arange(7), answer])
    assert logged["val/loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert logged["val/error"] == pytest.approx(np.mean((shown["denoised"] - clean) ** 2), rel=1e-5)
    assert logged["val/accuracy"] == pytest.approx(hits["denoised"])


def test_no_more_images_are_measured_than_asked(monkeypatch):
    """Of four batches of three, those before MEASURED is reached: two for 4 images; and anew in each epoch."""
    monkeypatch.setattr("gsmooth_lightning.lit.denoiser.MEASURED", 4)
    x, eps = images(12), noise(12)
    made = module(denoiser=Line(0.6, 0.1))
    for _ in range(2):
        asked = known(monkeypatch, made, [eps[:3], eps[3:6]])
        (logged,) = trainer().validate(made, batches(x, torch.zeros(12), 3), verbose=False)
        assert torch.equal(torch.cat(asked), x[:6])
        by_hand = np.mean((0.6 * (x + eps)[:6].double().numpy() + 0.1 - x[:6].double().numpy()) ** 2)
        assert (logged["val/loss"], logged["val/error"]) == (pytest.approx(by_hand, rel=1e-5),) * 2


def test_without_a_classifier_pixels_are_measured_alone():
    """nn.Identity stands for none."""
    made = module(nn.Identity())
    assert made.classifier is None
    (logged,) = trainer().validate(made, batches(images(4), torch.zeros(4), 4), verbose=False)
    assert set(logged) == {"val/loss", "val/error"}
    assert all(set(rows) == {"mean squared error of a pixel"} for rows in made.measured.values())


def test_a_black_box_is_measured_by_its_labels(monkeypatch):
    """The first pixel above a half."""
    box = BlackBox(lambda x: (x[:, 0, 0, 0] > 0.5).long().tolist())
    x, eps = images(8), noise(8)
    y = (x[:, 0, 0, 0] > 0.5).long()
    made = module(box, Line(0.5, 0.25))
    assert made.classifier is box
    known(monkeypatch, made, [eps])
    trainer().validate(made, batches(x, y, 8), verbose=False)
    right = {"clean": 1.0}
    for kind, seen in (("noisy", x + eps), ("denoised", 0.5 * (x + eps) + 0.25)):
        right[kind] = float(((seen[:, 0, 0, 0] > 0.5).long() == y).double().mean())
    assert {kind: float(rows["accuracy of the classifier"]) for kind, rows in made.measured.items()} == right
    assert right["noisy"] < 1


def test_the_picture_has_a_row_for_each_kind():
    """The first eight images of the first batch: clean, noisy, denoised, each drawn between 0 and 1."""
    made, x = module(denoiser=Line(0.0, 0.25)), images(14)
    trainer().validate(made, batches(x, torch.zeros(14), 10), verbose=False)
    axes = made.picture().axes
    assert [a.get_title(loc="left") for a in axes if a.get_title(loc="left")] == ["clean", "noisy", "denoised"]
    assert len(axes) == 3 * 8
    for i, cell in enumerate(axes[:8]):
        np.testing.assert_allclose(np.squeeze(cell.images[0].get_array()), x[i, 0], atol=1e-6)
    for cell in axes[16:]:
        np.testing.assert_allclose(np.squeeze(cell.images[0].get_array()), np.full(SHAPE[1:], 0.25), atol=1e-6)


def test_without_noise_there_is_nothing_to_take_off():
    smoothed = SmoothedClassifier(linear(), CLASSES, Rotation(), law=Gaussian(20.0))
    with pytest.raises(RequestError, match="a denoiser takes off pixel noise; use noise=gaussian"):
        module(smoothed=smoothed)
