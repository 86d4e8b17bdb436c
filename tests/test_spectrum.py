"""Noise of frequencies: `preprocess.Spectrum`, the network behind it, and error bounds through it."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from scipy.stats import norm

from conftest import SMALL, compose, one_sentence, records, run_main, run_task, snapshot
from gsmooth_lightning.certify import JointCertifier
from gsmooth_lightning.data import Digits
from gsmooth_lightning.error import ImageBound
from gsmooth_lightning.error.base import defect_norms
from gsmooth_lightning.error.chords import chord_norms
from gsmooth_lightning.error.interval import interval_defects
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model import load_weights, lowpass_cnn
from gsmooth_lightning.model.cnn import BandLimit, Synthesis
from gsmooth_lightning.model.fourier import fourier_basis
from gsmooth_lightning.preprocess import DiscVignette, LowPass, Preprocess, Spectrum, is_linear
from gsmooth_lightning.smoothed import LEVELS, SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import TransformationThreat
from gsmooth_lightning.transform import Rotation
from plans import Known, finish
from test_error import rotate

SIDES = [(28, 28), (27, 27), (12, 31), (8, 8)]
BANDWIDTHS = [0, 1, 2.5, 4, 5, 14, 40]


def line(u, bandwidth):
    """The last axis in cosines and sines by numpy's FFT, sum |c|^2 = sum |u|^2 where all are kept; their frequencies.

    X_f = sum_t u_t exp(-2 pi i f t / n): the cosine of f is weighed by Re X_f, the sine by -Im X_f.
    """
    n, transformed = u.shape[-1], np.fft.rfft(u)
    found, frequencies = [transformed[..., 0].real / math.sqrt(n)], [0]
    for f in range(1, min(math.floor(bandwidth), n // 2) + 1):
        own = 2 * f == n  # its own mirror image
        found.append(transformed[..., f].real * math.sqrt((1 if own else 2) / n))
        frequencies.append(f)
        if not own:
            found.append(-transformed[..., f].imag * math.sqrt(2 / n))
            frequencies.append(f)
    return np.stack(found, -1), np.array(frequencies)


def coefficients(x, bandwidth):
    """Of both axes, and 0 where f1^2 + f2^2 > bandwidth^2."""
    columns, f2 = line(x, bandwidth)
    both, f1 = line(np.swapaxes(columns, -1, -2), bandwidth)
    return np.swapaxes(both, -1, -2) * (f1[:, None] ** 2 + f2**2 <= bandwidth**2)


def pictures(n, *shape, seed=0):
    return torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the coefficients


@pytest.mark.parametrize("shape", SIDES)
@pytest.mark.parametrize("bandwidth", BANDWIDTHS)
def test_coefficients_are_those_of_numpys_fft(shape, bandwidth):
    x = pictures(2, 3, *shape)
    np.testing.assert_allclose(Spectrum(bandwidth)(x), coefficients(x.numpy(), bandwidth), atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 28])
def test_the_basis_is_orthonormal_and_complete(length):
    """B B' = I for every bandwidth; B' B = I from half the length on, where the Nyquist frequency has no sine."""
    for bandwidth in range(length + 1):
        basis, frequencies = fourier_basis(length, bandwidth)
        assert basis.dtype == torch.float64
        assert len(basis) == len(frequencies) == min(2 * bandwidth + 1, length)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)).double())
    torch.testing.assert_close(basis.T @ basis, torch.eye(length).double())


@pytest.mark.parametrize("shape", SIDES)
@pytest.mark.parametrize("bandwidth", [1, 4, 40])
def test_norms_of_band_limited_images_are_kept(shape, bandwidth):
    """||Spectrum(x)|| = ||LowPass(x)||, = ||x|| where x has no other frequencies; and the coefficients are the same."""
    spectrum, x = Spectrum(bandwidth), pictures(3, 2, *shape) - 0.5
    limited = LowPass(bandwidth)(x)
    norms = [u.flatten(1).norm(dim=1) for u in (spectrum(x), limited, spectrum(limited), x)]
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(norms[2], norms[1])
    torch.testing.assert_close(spectrum(limited), spectrum(x))
    assert (norms[3] > norms[0] * 1.01).all() or bandwidth == 40


def matrix(step, h, w, dtype):
    """Of a linear step on h x w images, in float64."""
    return step(torch.eye(h * w, dtype=dtype).view(h * w, 1, h, w)).flatten(1).T.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "bandwidth", "kept"), [((9, 14), 4, 49), ((8, 8), 3, 29), ((28, 28), 5, 81)])
def test_the_lipschitz_constant_is_one(shape, bandwidth, kept, dtype):
    """All singular values are 1 or 0, as many 1 as integers with f1^2 + f2^2 <= bandwidth^2; what the step stretches
    most, random directions, and what it does not see, attack it on an image."""
    spectrum = Spectrum(bandwidth)
    assert kept == sum(f**2 + g**2 <= bandwidth**2 for f, g in product(range(-bandwidth, bandwidth + 1), repeat=2))
    _, sizes, directions = torch.linalg.svd(matrix(spectrum, *shape, dtype))
    expected = torch.zeros_like(sizes).index_fill_(0, torch.arange(kept), 1.0)
    torch.testing.assert_close(sizes, expected, atol=1e-6, rtol=0)
    x = pictures(1, 1, *shape).to(dtype)
    random = torch.randn(200, len(directions), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    random = random / random.norm(dim=1, keepdim=True)
    moved = {}
    for name, delta in {"worst": directions[:kept], "random": random, "unseen": directions[kept:]}.items():
        there = spectrum(x + delta.view(-1, 1, *shape).to(dtype))
        moved[name] = (there - spectrum(x)).double().flatten(1).norm(dim=1)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    assert (moved["worst"] - 1).abs().max() < tolerance
    assert 0.2 < moved["random"].mean() < moved["random"].max() < spectrum.lipschitz
    assert moved["unseen"].max() < tolerance


def test_what_a_spectrum_states():
    """Linear with constant 1, alone and behind a vignette, whose matrix stretches nothing either."""
    steps = Preprocess([DiscVignette(), Spectrum(3)])
    assert steps.lipschitz == Spectrum(3).lipschitz == 1
    assert is_linear(steps)
    assert is_linear(Spectrum(3))
    assert torch.linalg.matrix_norm(matrix(steps, 9, 14, torch.float64), 2) <= 1 + 1e-12
    assert repr(Spectrum(3)) == "Spectrum(bandwidth=3)"


@pytest.mark.parametrize("side", [28, 127])
def test_a_white_image_fits_the_grid(side):
    """Its constant coefficient, the side, is the largest there is; encoded to the nearest step, as are all others."""
    smoothed = SmoothedClassifier(torch.nn.Identity(), 2, preprocess=Preprocess([Spectrum(10)]), noise=Gaussian(0.5))
    encoded = smoothed.encode(torch.ones(1, 1, side, side), torch.zeros(1, 0)).flatten()
    assert encoded[0] == side * LEVELS
    assert not encoded[1:].any()


def test_large_images_are_refused():
    """From 128 pixels on float32 holds a coefficient to half a step alone, and bounds allow for a quarter."""
    with pytest.raises(RequestError, match=r"^coefficients of images of 128 pixels a side are too large [^\n]*$"):
        Spectrum(5)(torch.ones(1, 1, 20, 128))


# ---------------------------------------------------------------- the network


NETWORKS = [
    {"size": 28, "side": 14, "bandwidth": 5},
    {"size": 8, "side": 6, "bandwidth": 2},
    {"size": 9, "side": 12, "bandwidth": 4, "channels": 3},
]
every_network = pytest.mark.parametrize("options", NETWORKS, ids=lambda o: str(o["size"]))


def both(options, seed=0):
    """The network of images and that of coefficients, with the same random weights and statistics."""
    made = []
    for spectrum in (False, True):
        torch.manual_seed(seed)
        made.append(lowpass_cnn(**options, widths=[4, 8], hidden=8, spectrum=spectrum).eval())
        made[-1][1].features[1].running_mean.normal_(generator=torch.Generator().manual_seed(seed))
    return made


@every_network
def test_coefficients_become_the_values_between_pixels(options):
    """The trigonometric polynomial sum_f X_f exp(2 pi i f.t / n) / n^2 of numpy's FFT, |f| <= bandwidth on each side,
    at the centres of side x side equal squares."""
    size, side, bandwidth = (options[name] for name in ("size", "side", "bandwidth"))
    x = pictures(2, 2, size, size)
    points = (np.arange(side) + 0.5) * size / side - 0.5
    waves = np.exp(2j * np.pi / size * np.arange(-bandwidth, bandwidth + 1) * points[:, None])  # (side, 2 b + 1)
    kept = np.fft.fft2(x.numpy())[..., np.arange(-bandwidth, bandwidth + 1), :]
    kept = kept[..., np.arange(-bandwidth, bandwidth + 1)]
    values = (waves @ kept @ waves.T).real / size**2
    all_of_them = Spectrum(2 * bandwidth).coefficients(x)[..., : 2 * bandwidth + 1, : 2 * bandwidth + 1]  # no disc
    np.testing.assert_allclose(Synthesis(size, side, bandwidth)(all_of_them.float()), values, atol=1e-6)
    np.testing.assert_allclose(BandLimit(size, side, bandwidth)(x.float()), values, atol=1e-6)


@every_network
def test_the_network_of_coefficients_is_the_network_of_low_passed_images(options):
    images, frequencies = both(options)
    x = 9 * pictures(5, options.get("channels", 1), options["size"], options["size"]).float()
    expected = images(LowPass(options["bandwidth"])(x))
    torch.testing.assert_close(frequencies(Spectrum(options["bandwidth"])(x)), expected, atol=1e-5, rtol=1e-5)
    assert (expected - expected[:1]).abs().max() > 1e-2


@every_network
def test_white_noise_is_the_same_in_both(options):
    """Covariance R R' (x) R R' behind the first layer, R its matrix of a side: of pixels and of coefficients, also of
    those beyond the disc, which carry noise alone."""
    sizes = [options[name] for name in ("size", "side", "bandwidth")]
    of_pixels, of_coefficients = BandLimit(*sizes).rows, Synthesis(*sizes).rows
    assert of_coefficients.shape == (options["side"], 2 * options["bandwidth"] + 1)
    torch.testing.assert_close(of_coefficients @ of_coefficients.T, of_pixels @ of_pixels.T, atol=1e-6, rtol=0)


@every_network
def test_checkpoints_of_either_are_the_others(options, tmp_path):
    x = pictures(5, options.get("channels", 1), options["size"], options["size"]).float()
    inputs = LowPass(options["bandwidth"])(x), Spectrum(options["bandwidth"])(x)
    trained, fresh = both(options, seed=0), both(options, seed=1)
    for source, other in ((0, 1), (1, 0)):
        expected = trained[source](inputs[source])
        assert (fresh[other](inputs[other]) - expected).abs().max() > 1e-2
        torch.save(trained[source].state_dict(), tmp_path / "network.ckpt")
        load_weights(fresh[other], tmp_path / "network.ckpt")
        torch.testing.assert_close(fresh[other](inputs[other]), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- error bounds


BANDWIDTH, ANGLE = 3, 15.0
SIGMA = 0.1 + 0.4 * pictures(1, 2 * BANDWIDTH + 1, 2 * BANDWIDTH + 1, seed=5)[0]


def digit(index, steps, sigma, high=8.0):
    """A smoothed classifier of digits behind these steps, a threat of rotation, and an image of it."""
    base = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)).eval()
    laws = {"law": Gaussian(ANGLE), "noise": Gaussian(sigma)}
    smoothed = SmoothedClassifier(base, 10, Rotation(), Preprocess(steps), **laws, block=64).eval()
    threat = TransformationThreat(Rotation(), -high, high)
    return smoothed, threat, threat.prepare(Digits().split("test", 10)[index][0][None])[0]


def encoded(images):
    """Disc, coefficients by numpy's FFT, rounded to the grid."""
    rows, columns = np.mgrid[:8, :8] - 3.5
    return np.rint(coefficients(images * (rows**2 + columns**2 <= 3.5**2), BANDWIDTH) * LEVELS) / LEVELS


def by_hand(x, gammas, theta):
    """||(encoded psi(file, theta) - encoded psi(x, theta + gamma)) / sigma|| by scipy and numpy, (gammas, thetas); the
    file psi(x, gamma) is saved in 8 bits."""
    pixels, found = x[0].double().numpy(), []
    for gamma in gammas:
        file = np.rint(rotate(pixels, [gamma])[0].clip(0, 1) * 255) / 255
        apart = encoded(rotate(file, theta)) - encoded(rotate(pixels, theta + gamma))
        found.append(np.sqrt(((apart / SIGMA.numpy()) ** 2).sum((1, 2))))
    return np.stack(found)


STEPS = [DiscVignette(), Spectrum(BANDWIDTH)]
DENSE = np.linspace(-8, 8, 81)


def test_what_noise_is_added_to_is_the_spectrum_on_the_grid():
    smoothed, _, x = digit(3, STEPS, SIGMA)
    assert smoothed.encoded_shape(x) == (1, 7, 7)
    theta = torch.linspace(-40, 40, 50, dtype=torch.float64)[:, None]
    found = smoothed.encode(x.expand(50, *x.shape), theta)[:, 0].double().numpy() / LEVELS
    turned = rotate(x[0].double().numpy(), theta[:, 0].numpy())
    np.testing.assert_allclose(found, encoded(turned), atol=3 / LEVELS)


@pytest.mark.parametrize("index", [0, 17, 203])
def test_measured_defects_are_those_by_hand(index):
    """In units of a sigma for each frequency; a step of the grid is paid for rounding."""
    smoothed, threat, x = digit(index, STEPS, SIGMA)
    theta = np.random.default_rng(2).normal(0, ANGLE, 100)
    gammas = torch.tensor([[-8.0], [-3.0], [5.0]])
    masks = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    files = threat.apply(x.expand(3, *x.shape), gammas)
    ours = defect_norms(smoothed, x, files, gammas, torch.from_numpy(theta)[:, None], masks)[:, 0].numpy()
    slow = by_hand(x, gammas[:, 0].double().numpy(), theta).max(0)
    np.testing.assert_allclose(ours, slow, atol=2e-3)
    assert (ours >= slow).all()
    assert slow.max() > 0.5


@pytest.mark.parametrize("index", [0, 203])
def test_proved_maxima_are_above_every_defect_by_hand(index):
    """Of chords and of intervals, for each theta, over 81 attacks and the ends of the range."""
    smoothed, threat, x = digit(index, STEPS, SIGMA)
    theta = np.random.default_rng(3).normal(0, ANGLE, 6)
    slow = by_hand(x, DENSE, theta).max(0)
    rows, masks = torch.from_numpy(theta)[:, None], torch.ones(1, 1, 7, 7, dtype=torch.bool)
    bounds = {
        "chords": finish(chord_norms(smoothed, threat, x, rows, masks))[:, 0].numpy(),
        "intervals": interval_defects(smoothed, threat, x, rows, pieces=256).numpy(),
    }
    for name, bound in bounds.items():
        assert (bound >= slow).all(), name
        assert (bound < 1.25 * slow).all(), name


@pytest.mark.parametrize("search", ["grid", "chords", "intervals"])
@pytest.mark.parametrize("index", [3, 111])
def test_the_bound_of_the_joint_certificate_covers_defects_by_hand(index, search):
    """P(defect > E) <= rho by quadrature over theta, 400 equally likely strata, and 21 attacks, or the grid's own 9; E
    is chosen as the quantile .9 of bounds, and is near that of defects."""
    smoothed, threat, x = digit(index, STEPS, SIGMA)
    error = ImageBound(draws=128, choose=64, quantile=0.9, alpha=1e-4, soft=False, search=search, points=9)
    certificate = finish(JointCertifier(Known(0.999), error).procedure(smoothed, threat, x, Stream(0, index)))
    assert certificate.guarantee == ("heuristic" if search == "grid" else "sound")
    theta = ANGLE * norm.ppf((np.arange(400) + 0.5) / 400)
    worst = by_hand(x, np.linspace(-8, 8, 9) if search == "grid" else DENSE[::4], theta).max(0)
    assert (worst > certificate.details["E"]).mean() <= certificate.details["rho"] < 0.3
    assert certificate.details["E"] < 1.2 * np.quantile(worst, 0.9)


def test_one_sigma_for_all_gives_the_defects_of_the_low_pass():
    """The coefficients are orthonormal: norms of defects are those in pixels, up to the rounding to the grid."""
    theta, gammas = torch.linspace(-40, 40, 64, dtype=torch.float64)[:, None], torch.tensor([[-8.0], [3.0]])
    found = []
    for steps in ([DiscVignette(), LowPass(BANDWIDTH)], STEPS):
        smoothed, threat, x = digit(17, steps, 0.25)
        masks = torch.ones(1, *smoothed.encoded_shape(x), dtype=torch.bool)
        found.append(defect_norms(smoothed, x, threat.apply(x.expand(2, *x.shape), gammas), gammas, theta, masks))
    torch.testing.assert_close(*found, atol=1e-3, rtol=0)
    assert found[0].max() > 0.3


# ---------------------------------------------------------------- commands


DATA = (*SMALL, "data.size=8", "data.enlarge=null", "model.widths=[4]", "model.hidden=8")
SIZES = ("model.side=6", "model.bandwidth=2", "preprocess.steps.1.bandwidth=2")
PIXELS = ("model=lowpass_cnn", "preprocess=disc_lowpass", *DATA, *SIZES)
FREQUENCIES = ("model=spectrum_cnn", "preprocess=disc_spectrum", *DATA, *SIZES)
RUNS = {"pixels": PIXELS, "frequencies": FREQUENCIES}


@pytest.fixture(scope="module")
def untrained(network):
    """A network of frequencies."""
    return network(*FREQUENCIES)


def test_the_configured_parts_fit_each_other():
    """At their defaults, 28 pixels: 81 of 11 x 11 coefficients, and the network of mnist_rotation behind them."""
    cfg = compose("certify", "model=spectrum_cnn", "preprocess=disc_spectrum")
    x = pictures(2, 1, 28, 28).float()
    seen = instantiate(cfg.preprocess)(x)
    assert seen.shape == (2, 1, 11, 11)
    assert int((seen[0] != 0).sum()) == 81
    frequencies = instantiate(cfg.model).eval()
    cfg = compose("certify", "model=lowpass_cnn", "preprocess=disc_lowpass")
    images = instantiate(cfg.model).eval()
    images.load_state_dict(frequencies.state_dict())
    torch.testing.assert_close(frequencies(seen), images(instantiate(cfg.preprocess)(x)), atol=1e-5, rtol=1e-5)


def test_a_network_trained_on_images_is_certified_with_noise_of_frequencies(here):
    """Its predictions without noise are the same in both, and, with one sigma for all, the defects that choose E."""
    kept = [o for o in PIXELS if not o.startswith(("threat", "sampling", "error", "images"))]
    file = run_task("train", *kept, "train.epochs=1", "store=trained")
    found = [records(run_task("certify", *o, f"checkpoint={file}", f"store={name}")) for name, o in RUNS.items()]
    for one, two in zip(*found, strict=True):
        assert one["base"] == two["base"]
        assert one["details"]["E"] == pytest.approx(two["details"]["E"], abs=2e-3)
        assert one["details"]["E"] > 0.1
    assert len({r["base"] for r in found[0]}) > 1


def test_sigma_is_learned_for_each_frequency(untrained, here):
    """And certified; for noise of pixels its file is refused."""
    options = ("maximise=range", "maximise.n0=4", "maximise.draws=2", "maximise.points=3")
    options = (*options, "learn.epochs=1", "learn.limit_train_batches=2")
    kept = [o for o in FREQUENCIES if not o.startswith(("sampling", "error", "images"))]
    learned = run_task("sigma", *kept, *options, f"checkpoint={untrained}", "store=sigma")
    sigma = torch.load(learned, weights_only=True)["noise"]["sigma"]
    assert sigma.shape == (1, 5, 5)
    assert sigma.std() > 0
    found = records(run_task("certify", *FREQUENCIES, f"checkpoint={untrained}", f"learned={learned}", "store=run"))
    assert len(found) == 6
    mistake = run_main("certify", *PIXELS, f"checkpoint={untrained}", f"learned={learned}", "store=other")
    one_sentence(mistake, "(1, 5, 5)", "(1, 8, 8)")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("bandwidth", [-1, -1e-9, math.nan, -math.inf, math.inf, "much"])
def test_impossible_bandwidths_are_refused(bandwidth):
    with pytest.raises(RequestError, match=r"^preprocess\.bandwidth must be [^\n]*, got [^\n]*$"):
        Spectrum(bandwidth)


MISTAKES = {
    "a negative bandwidth": (("preprocess.steps.1.bandwidth=-1",), ("preprocess.bandwidth must be at least 0",)),
    "a word": (("preprocess.steps.1.bandwidth=much",), ("preprocess.bandwidth must be one number", "much")),
    "more coefficients than the network takes": (("preprocess.steps.1.bandwidth=3",), ()),
    "fewer coefficients than the network takes": (("model.bandwidth=3",), ()),
    "a network of images": (("model=lowpass_cnn",), ()),
    "images for a network of coefficients": (("preprocess=disc_lowpass",), ()),
    "a fraction of a frequency": (("model.bandwidth=2.5",), ("model",)),
    "no frequency": (("model.bandwidth=0",), ("model",)),
    "an unknown option": (("+model.spectra=true",), ("model", "spectra")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_sentence(case, untrained, here):
    """Exit status 2, and nothing is written."""
    overrides, words = MISTAKES[case]
    one_sentence(run_main("certify", *FREQUENCIES, f"checkpoint={untrained}", *overrides), *words)
    assert snapshot(here) == {}
