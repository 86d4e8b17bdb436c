"""Bounds from a received file alone: what clean images may have been, attacked by linear programming, and the reversed
theorem."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.optimize import linprog
from scipy.sparse import eye, hstack, vstack
from scipy.stats import norm

from attackers import inverse_is_tight
from gsmooth_lightning.certify import JointCertifier, NestedCertifier, ReceivedCertifier
from gsmooth_lightning.data import Digits
from gsmooth_lightning.error import Bound, Conditions, ImageBound, InverseBound, StoredBound
from gsmooth_lightning.error.base import defect_norms, pair_norms
from gsmooth_lightning.error.inverse import Cells, Sources, framed, inverse_norms, narrow, sources
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.plans import FixedN
from gsmooth_lightning.preprocess import DiscVignette, GaussianLowPass, LowPass, Preprocess, Resize
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Rotation, Scaling, Shear, Translation
from pictures import real_digits
from plans import Given, Known, finish

ANGLE, NOISE = 15.0, 0.25
RANGES = [(Rotation(), 40.0), (Scaling(), 0.4), (Shear(), 0.5)]
WHOLE = torch.ones(1, 1, 8, 8, dtype=torch.bool)


def pictures(n, c=1, seed=0):
    """n files of 8x8: noise, black and white noise, checkerboards, digits, black, white, single pixels; in turn."""
    rng = np.random.default_rng(seed)
    digits = Digits().split("test", 10)
    rows, columns = np.mgrid[:8, :8]
    kinds = [
        lambda: rng.random((c, 8, 8)),
        lambda: rng.integers(0, 2, (c, 8, 8)),
        lambda: np.broadcast_to((rows + columns + rng.integers(2)) % 2, (c, 8, 8)),
        lambda: digits[int(rng.integers(300))][0].expand(c, 8, 8).numpy(),
        lambda: np.zeros((c, 8, 8)),
        lambda: np.ones((c, 8, 8)),
        lambda: rng.random((c, 8, 8)) < 1 / 64,
    ]
    made = np.stack([np.asarray(kinds[i % len(kinds)](), dtype=np.float32) for i in range(n)])
    return torch.from_numpy(np.rint(made * 255) / 255).float()


def matrix(degrees):
    """Rotation by map_coordinates, bilinear, black outside, as a matrix on images of 8x8."""
    rows, columns = np.mgrid[:8, :8] - 3.5
    turn = math.radians(degrees)
    places = np.stack(
        [math.sin(turn) * columns + math.cos(turn) * rows, math.cos(turn) * columns - math.sin(turn) * rows]
    )
    basis = np.eye(64).reshape(64, 8, 8)
    return np.stack([map_coordinates(e, places + 3.5, order=1, mode="grid-constant").ravel() for e in basis], 1)


def consistent(file, degrees, objective, half=0.5 / 255 - 1e-6):
    """The clean image in [0, 1] of largest objective . x that a rotation makes this file of, (64,); None: there is
    none."""
    turn, v = matrix(degrees), file.double().numpy().ravel()
    found = linprog(-objective, np.vstack([turn, -turn]), np.concatenate([v + half, half - v]), bounds=(0, 1))
    return found.x if found.status == 0 else None


def digits(preprocess=None, saved="8bit", high=20.0, base=None):
    """A smoothed classifier of digits and the threat by rotation."""
    base = base if base is not None else torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    preprocess = preprocess if preprocess is not None else Preprocess([DiscVignette(), LowPass(3)])
    smoothed = SmoothedClassifier(base, 10, Rotation(), preprocess, Gaussian(ANGLE), Gaussian(NOISE), block=64)
    return smoothed.eval(), TransformationThreat(Rotation(), -high, high, saved=saved)


# ---------------------------------------------------------------- clean images


def test_the_matrix_is_the_transformation():
    """The reference of this file agrees with grid_sample."""
    x = pictures(1)
    turned = Rotation()(x, torch.tensor([[23.0]])).numpy().ravel()
    np.testing.assert_allclose(matrix(23.0) @ x.numpy().ravel(), turned, atol=1e-5)


@pytest.mark.parametrize("saved", ["8bit", "float"])
@pytest.mark.parametrize(("transform", "most"), RANGES)
def test_bounds_hold_the_clean_image(transform, most, saved):
    """1,400 clean images of all kinds, each with its own gamma and a piece of any width around it, refined five times:
    every pixel of every image stays within its bounds."""
    n, rng = 1400, np.random.default_rng(1)
    x = pictures(n, c=2)
    gamma = torch.from_numpy(rng.uniform(-most, most, (n, 1)))
    files = TransformationThreat(transform, -most, most, saved=saved).apply(x, gamma.float()).double().flatten(2)
    width = torch.from_numpy(most * 10.0 ** rng.uniform(-5, -1, (n, 1)))
    share = torch.from_numpy(rng.random((n, 1)))
    cells = Cells.of(transform.boxes(gamma - share * width, gamma + (1 - share) * width, 8, 8), 8, 8)
    half = 1e-5 + (0.5 / 255 if saved == "8bit" else 0)
    most_, clean = framed(torch.ones_like(x).double()), framed(x.double())
    least_ = torch.zeros_like(most_)
    for _ in range(5):
        least_, most_ = narrow(least_, most_, files - half, files + half, cells)
        assert (least_ <= clean + 1e-10).all()
        assert (clean <= most_ + 1e-10).all()
    wide = framed(torch.ones(1, 8, 8)).mean()  # of no bound at all
    assert (most_ - least_)[width[:, 0] < most * 1e-3].mean() < 0.7 * wide


@pytest.mark.parametrize(("transform", "most"), RANGES)
def test_the_piece_of_the_true_gamma_is_kept(transform, most):
    """Whatever is split and pruned: some piece holds gamma, and its bounds the clean image."""
    rng = np.random.default_rng(2)
    for saved in ("8bit", "float"):
        threat = TransformationThreat(transform, -most, most, saved=saved)
        for x in pictures(14, seed=3):
            gamma = float(np.float32(rng.uniform(-most, most)))
            file = threat.apply(x[None], torch.tensor([[gamma]]))[0]
            found = sources(threat, file, pieces=16, splits=2, refinements=4)
            holds = ((found.low <= gamma) & (gamma <= found.high))[:, 0]
            inside = (found.least <= framed(x.double()) + 1e-9) & (framed(x.double()) <= found.most + 1e-9)
            assert (holds & inside.flatten(1).all(1)).any()


def test_bounds_against_linear_programming():
    """The bounds of each pixel hold its least and largest value over all clean images of a file, found by a linear
    program; where the program is feasible its gamma is kept, and it is infeasible in the middle of pruned pieces."""
    _, threat = digits()
    rng = np.random.default_rng(4)
    pruned = 0
    for x in pictures(7, seed=5)[[0, 1, 2, 3, 6]]:
        gamma = rng.uniform(-20, 20)
        file = threat.apply(x[None], torch.tensor([[gamma]]).float())[0]
        found = sources(threat, file, pieces=16, splits=0, refinements=10)
        least, most = (entry.view(-1, 12, 12)[:, 1:9, 1:9].flatten(1).numpy() for entry in (found.least, found.most))
        for angle in (gamma, *(-20 + 2.5 * (np.arange(16) + 0.5))):
            (kept,) = np.nonzero(((found.low <= angle) & (angle <= found.high))[:, 0].numpy())
            if not len(kept):
                pruned += 1
                assert consistent(file, angle, np.zeros(64), half=0.5 / 255) is None
                continue
            for j in rng.choice(64, 2):
                for sign in (1, -1):
                    extreme = consistent(file, angle, sign * np.eye(64)[j])
                    if extreme is not None:
                        assert (least[kept[0]] <= extreme + 1e-7).all()
                        assert (extreme <= most[kept[0]] + 1e-7).all()
    assert pruned > 20


def test_a_bright_pixel_comes_from_no_wide_angle():
    """One white pixel off the centre: its four sources would be white, and their neighbours grey. Only angles next to 0
    remain; of a black file nothing is excluded, and all that is certain of it is near black."""
    _, threat = digits(high=45.0)
    file = torch.zeros(1, 8, 8)
    file[0, 2, 3] = 1
    found = sources(threat, file, pieces=32, splits=3, refinements=5)
    assert found.low.min() <= 0 <= found.high.max()
    assert found.low.min() > -1
    assert found.high.max() < 1
    black = sources(threat, torch.zeros(1, 8, 8), pieces=32, splits=3, refinements=5)
    assert (float(black.low.min()), float(black.high.max()), len(black.low)) == (-45, 45, 32)
    assert black.least.max() <= 0
    inner = black.most.view(-1, 12, 12)[:, 3:7, 3:7]
    assert inner.max() < 0.03


def test_a_weight_that_vanishes_bounds_nothing():
    """A position between .9 and 1.1 columns touches two cells. The left one alone would bound the first pixel by
    (v + half) / .1, yet at column 1.05 it is not even looked at: it is white here, and the file black."""
    row = torch.zeros(1, 1).double()
    white = framed(torch.ones(1, 1, 1, 3)).double()

    def most(first, last):
        cells = Cells.of((torch.full_like(row, first), torch.full_like(row, last), row, row), 1, 3)
        v = torch.zeros(1, 1).double()
        least, upper = narrow(torch.zeros_like(white), white, v - 0.002, v + 0.002, cells)
        assert (least == 0).all()
        return upper.view(5, 7)[1, 1:4].tolist()

    first, second, third = most(0.9, 1.1)
    assert (first, third) == (1, 1)
    assert second == pytest.approx(0.002 / 0.9)  # a corner of both cells
    assert most(0.9, 0.95)[0] == pytest.approx(0.002 / 0.05)
    assert most(0.9, 0.95)[2] == 1
    assert most(0.2, 2.6) == [1, 1, 1]  # three cells


# ---------------------------------------------------------------- defects


def test_no_consistent_image_has_a_larger_defect():
    """An attacker who keeps the file and pushes the clean image, by linear programs, to where the defect grows: within
    the bound for each theta, at many gammas, and at times well beyond the defect of the true image."""
    theta = torch.from_numpy(np.random.default_rng(6).normal(0, ANGLE, (24, 1)))
    beyond = tried = 0
    for preprocess in (Preprocess([DiscVignette(), LowPass(3)]), Preprocess([GaussianLowPass(1.0)]), None):
        smoothed, threat = digits(preprocess or torch.nn.Identity())
        for x, gamma in zip(pictures(4, seed=7)[[0, 2, 3]], (7.3, -15.1, 18.2), strict=True):
            file = threat.apply(x[None], torch.tensor([[gamma]]))[0]
            found = sources(threat, file, pieces=32, splits=3, refinements=5)
            bound = inverse_norms(smoothed, file, found, theta)
            true = defect_norms(smoothed, x, file[None], torch.tensor([[gamma]]), theta, WHOLE)[:, 0]
            assert (true <= bound + 1e-9).all()
            pieces = found.low[:: max(1, len(found.low) // 3), 0]
            for angle in [gamma, *(pieces + 0.01).tolist()]:
                for k in range(0, 24, 8):
                    push = attack(smoothed, file, angle, theta[k : k + 1])
                    clean = consistent(file, angle, push)
                    if clean is None:
                        continue
                    other = torch.from_numpy(clean).float().view(1, 8, 8).clamp(0, 1)
                    assert torch.equal(threat.apply(other[None], torch.tensor([[angle]]))[0], file)
                    norms = defect_norms(smoothed, other, file[None], torch.tensor([[angle]]), theta, WHOLE)[:, 0]
                    assert (norms <= bound + 1e-9).all()
                    tried, beyond = tried + 1, beyond + int(norms[k] > 1.1 * true[k])
    assert tried > 40
    assert beyond >= 5


def test_every_gamma_of_a_piece_is_covered():
    """Clean images that are known exactly, grey on one side, which turning makes lighter or darker, and a black file:
    no gamma of a piece of 1 or 8 degrees has a larger norm than the bound, and the largest is near it."""
    smoothed, _ = digits(torch.nn.Identity())
    ramp = (torch.arange(8) / 7)[:, None] * (torch.arange(8) > 4)
    theta = torch.tensor([[-30.0], [0.0], [11.0]]).double()
    black = torch.zeros(3, 1, 8, 8)
    for x in (ramp[None], ramp.flip(0)[None]):
        known = framed(x.double())[None]
        for first, last in ((2.0, 3.0), (-7.0, 1.0)):
            ends = torch.tensor([[first], [last]]).double()
            bound = inverse_norms(smoothed, black[0], Sources(ends[:1], ends[1:], known, known), theta)
            gammas = torch.linspace(first, last, 33).double().view(33, 1, 1).expand(33, 3, 1)
            norms = torch.stack([pair_norms(smoothed, x, black, gamma, theta, WHOLE)[:, 0] for gamma in gammas])
            assert (norms <= bound + 1e-9).all()
            assert (norms.amax(0) > 0.9 * bound).all()


def attack(smoothed, file, angle, theta):
    """Direction in which clean images move the defect at theta most, from a consistent one: its gradient."""
    start = consistent(file, angle, np.zeros(64))
    if start is None:
        return np.zeros(64)
    x = torch.from_numpy(start).float().view(1, 1, 8, 8).requires_grad_()
    seen = smoothed.preprocess(smoothed.transform(x, theta.float() + angle))
    turned = smoothed.preprocess(smoothed.transform(file[None], theta.float()))
    return torch.autograd.grad((turned - seen).square().sum(), x)[0].double().numpy().ravel()


def test_the_bound_is_the_same_under_inference_mode():
    """Derivatives of positions are 0 under it, unless somebody sees to it."""
    smoothed, threat = digits()
    theta = torch.tensor([[3.0], [-20.0]]).double()
    x = pictures(4)[3]
    with torch.inference_mode():
        file = threat.apply(x[None], torch.tensor([[9.0]]))[0]
        inside = sources(threat, file, 8, 1, 3)
        norms = inverse_norms(smoothed, file, inside, theta.clone())
    outside = sources(threat, file.clone(), 8, 1, 3)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(norms, inverse_norms(smoothed, file.clone(), outside, theta))


def test_colours_are_bounded_together():
    """Three channels: a file's norm is that of its channels, and pieces that one channel excludes are excluded."""
    smoothed, threat = digits(Preprocess([DiscVignette()]))
    x = pictures(4, c=3)[[0]][0]
    file = threat.apply(x[None], torch.tensor([[9.0]]))[0]
    theta = torch.tensor([[5.0], [-12.0]]).double()
    found = sources(threat, file, 16, 3, 5)
    single = [sources(threat, file[i : i + 1], 16, 3, 5) for i in range(3)]
    assert len(found.low) <= min(len(one.low) for one in single)
    mask = torch.ones(1, 3, 8, 8, dtype=torch.bool)
    true = defect_norms(smoothed, x, file[None], torch.tensor([[9.0]]), theta, mask)[:, 0]
    assert (true <= inverse_norms(smoothed, file, found, theta)).all()


def test_tightness_on_real_digits():
    """In black and white alone: a black or white pixel of an 8-bit file is clipped at the end of the range, which
    leaves the clean pixels under it hardly a choice; a grey one leaves them many, and the bound is 7 to 13 times the
    search."""
    for x, gamma in zip(real_digits().gt(0.5).float(), (8.22, -10.4), strict=True):
        inverse_is_tight(x, gamma)


# ---------------------------------------------------------------- the theorem, reversed


def test_rho_belongs_inside():
    """pA = .9, a shift by half a sigma, rho = .01. The adversary chooses votes v(theta) and takes away b <= v, of mass
    rho at the file, to leave the least at the clean image: a linear program over cells of theta."""
    edges = np.linspace(-8, 8, 1601)
    at_file, at_clean = (np.diff(norm.cdf(edges, mean)) for mean in (0, 0.5))
    n, none = len(at_file), np.zeros(len(at_file))
    worst = linprog(
        np.concatenate([at_clean, -at_clean]),
        vstack([hstack([-eye(n), eye(n)]), np.concatenate([none, at_file])[None]]).tocsr(),
        np.concatenate([none, [0.01]]),
        np.concatenate([at_file, none])[None],
        [0.9],
        bounds=(0, 1),
    ).fun
    smoothed, _ = digits()
    threat, bound = TransformationThreat(Rotation(), -7.5, 7.5), Bound(0.0, 0.01, 1e-4, "sound")
    transfers = [
        c(Known(0.9), None).transfer(smoothed, threat, bound, 64, 0.0) for c in (ReceivedCertifier, JointCertifier)
    ]
    inside, outside = (float(transfer(0.9, 7.5)) for transfer in transfers)
    assert inside <= worst + 1e-9
    assert inside == pytest.approx(worst, abs=1e-4)
    assert inside == pytest.approx(0.7662, abs=5e-5)
    assert outside == pytest.approx(0.7728, abs=5e-5)
    assert outside > worst + 0.006  # what it claims is false
    assert float(transfers[0](0.9, 0.0)) == 0.9  # the file is the clean image


@pytest.mark.parametrize("e", [0.4, 1.0])
def test_the_adversary_of_defect_and_shift_is_met(e):
    """Votes Phi(a - b theta) of slope b = shift / (E sigma) lose E everywhere: what is left is the bound. The votes
    that rho takes come on top of them at the file, and are gone at the clean image."""
    shift, rho, pa = 0.5, 0.02, 0.95
    b = shift / e
    a = norm.ppf(pa - rho) * math.sqrt(1 + b**2)
    theta = np.linspace(-12, 12, 200_001)
    weights = norm.pdf(theta) / norm.pdf(theta).sum()
    shifted = norm.pdf(theta, shift) / norm.pdf(theta, shift).sum()
    assert weights @ norm.cdf(a - b * theta) == pytest.approx(pa - rho, abs=1e-9)
    left = shifted @ norm.cdf(a - b * theta - e)
    smoothed, _ = digits()
    threat, bound = TransformationThreat(Rotation(), -shift * ANGLE, shift * ANGLE), Bound(e, rho, 1e-4, "sound")
    transfer = ReceivedCertifier(Known(pa), None).transfer(smoothed, threat, bound, 64, 0.0)
    assert float(transfer(pa, shift * ANGLE)) == pytest.approx(left, abs=1e-9)


class Template(torch.nn.Module):
    """Class 1 where an image agrees with a template: a half-space."""

    def __init__(self, template, threshold):
        super().__init__()
        self.template, self.threshold = template, threshold

    def forward(self, inputs):
        value = (inputs * self.template).flatten(1).sum(1) - self.threshold
        return torch.stack([-value, value], 1)

    def probability(self, smoothed, x):
        """P(class 1) at x: exact in the noise, a quadrature in theta."""
        theta = torch.from_numpy(ANGLE * norm.ppf((np.arange(2000) + 0.5) / 2000))[:, None]
        seen = smoothed.encode(x.expand(2000, *x.shape), theta) / smoothed.levels
        value = (seen * self.template).flatten(1).sum(1).double() - self.threshold
        return float(norm.cdf(value.numpy() / (NOISE * float(self.template.norm()))).mean())


def test_the_clean_image_keeps_what_the_theorem_says():
    """Exact probabilities of half-spaces at a file and at its clean image: the latter is never below T, and the clean
    image is of the certified class."""
    certified = 0
    for i, gamma in enumerate((-18.0, -6.0, 3.0, 12.0)):
        x = Digits().split("test", 10)[i][0]
        base = Template(x - x.mean(), 0.0).eval()
        smoothed, threat = digits(base=base)
        smoothed.classes = 2
        file = threat.apply(x[None], torch.tensor([[gamma]]))[0]
        for threshold in (0.0, 0.5, 1.0):  # the classifier's, where votes are divided
            base.threshold = threshold
            at_clean, at_file = base.probability(smoothed, x), base.probability(smoothed, file)
            certifier = ReceivedCertifier(Known(at_file), InverseBound(256, 64, pieces=16, splits=2, refinements=4))
            certifier.check(smoothed, threat)
            certificate = finish(certifier.procedure(smoothed, threat, file, Stream(3, i)))
            bound = Bound(certificate.details["E"], certificate.details["rho"], 0.0, "sound")
            assert certificate.guarantee == "sound"
            assert at_clean >= float(certifier.transfer(smoothed, threat, bound, 64, 0.0)(at_file, abs(gamma))) - 1e-9
            if certificate.prediction >= 0 and certificate.radius >= abs(gamma):
                certified += 1
                assert at_clean > 0.5
    assert certified >= 2


def test_rho_is_that_of_fresh_draws():
    """E a quantile of the chosen bounds: the mass beyond it, by quadrature over theta, is at most rho."""
    smoothed, threat = digits()
    x = pictures(4)[3]
    file = threat.apply(x[None], torch.tensor([[9.0]]))[0]
    error = InverseBound(draws=512, choose=64, quantile=0.9, pieces=16, splits=1, refinements=3)
    bound = finish(error.procedure(smoothed, threat, file, Stream(0, 1)))
    theta = torch.from_numpy(ANGLE * norm.ppf((np.arange(2000) + 0.5) / 2000))[:, None]
    norms = inverse_norms(smoothed, file, sources(threat, file, 16, 1, 3), theta).numpy()
    beyond = (norms > bound.value).mean()
    assert 0.02 < beyond <= bound.rho < 0.3
    assert bound.guarantee == "sound"
    assert bound.alpha == 1e-4
    assert bound.details["largest"] >= bound.value
    low, high = bound.details["gammas"]
    assert low <= 9 <= high
    assert 0 < bound.details["width"] < 0.5


# ---------------------------------------------------------------- certificates


def test_attacked_images_are_certified_from_the_file_alone():
    """The gamma is in the record, lies in the range, and the certificate is that of the attacked file."""
    x = Digits().split("test", 10)[0][0]
    smoothed, threat = digits(base=Template(x - x.mean(), 0.0).eval())
    x, smoothed.classes = threat.prepare(x[None])[0], 2
    error, plan = InverseBound(64, 32, pieces=8, splits=1, refinements=2), FixedN(16, 256)
    attacked = ReceivedCertifier(plan, error, attacked=True)
    ((_, certificate),) = attacked.certify(smoothed, threat, [(5, x)], seed=2)
    (gamma,) = certificate.details["gamma"]
    assert -20 <= gamma <= 20
    file = threat.apply(x[None], torch.tensor([[gamma]]))[0]
    ((_, again),) = ReceivedCertifier(plan, error).certify(smoothed, threat, [(5, file)], seed=2)
    details = {key: value for key, value in certificate.details.items() if key != "gamma"}
    assert replace(certificate, details=details, seconds=0.0) == replace(again, seconds=0.0)
    assert certificate.prediction == 1
    stepped = TransformationThreat(Rotation(), -20.0, 20.0, step=8.0)
    ((_, listed),) = attacked.certify(smoothed, stepped, [(5, x)], seed=2)
    assert listed.details["gamma"][0] in (-16, -8, 0, 8, 16)


def test_bounds_and_theorems_of_one_direction_only():
    """Joint and nested refuse the bound of a received file, stored or not; received refuses one of a clean image."""
    smoothed, threat = digits()
    inverse = InverseBound(pieces=8)
    stored = StoredBound([], Conditions(smoothed, threat), inverse)
    plan = FixedN(16, 256)
    for error in (inverse, stored):
        for certifier in (JointCertifier(plan, error), NestedCertifier(plan, [FixedN(16, 64)], error)):
            with pytest.raises(UncertifiableError, match="certify=received"):
                certifier.check(smoothed, threat)
        ReceivedCertifier(plan, error).check(smoothed, threat)
    for error in (ImageBound(soft=False), ImageBound(), Given(Bound(1.0, 0.0, 0.0, "sound"))):
        with pytest.raises(UncertifiableError, match="error=inverse"):
            ReceivedCertifier(plan, error).check(smoothed, threat)
    with pytest.raises(UncertifiableError, match="error=inverse with certify=received"):
        ReceivedCertifier(plan, None).check(smoothed, threat)


@pytest.mark.parametrize(
    ("mine", "theirs", "saved", "preprocess", "message"),
    [
        (Rotation("bicubic"), Rotation(), "8bit", None, "bilinear"),
        (Rotation(), Rotation("nearest"), "8bit", None, "bilinear"),
        (Translation(), Translation(), "8bit", None, "rotation, scaling or shear"),
        (Rotation(), Rotation(), "16bit", None, "8bit or float"),
        (Rotation(), Rotation(), "8bit", Preprocess([Resize(6)]), "Lipschitz"),
    ],
)
def test_what_is_refused(mine, theirs, saved, preprocess, message):
    """Other warps, formats and preprocessing, before any work."""
    smoothed = SmoothedClassifier(
        torch.nn.Identity(), 10, mine, preprocess, Gaussian([1.0] * mine.dim), Gaussian(NOISE)
    )
    threat = TransformationThreat(theirs, -1.0, 1.0, saved=saved)
    with pytest.raises(UncertifiableError, match=message):
        ReceivedCertifier(FixedN(16, 256), InverseBound()).check(smoothed, threat)


def test_pixel_threats_are_refused():
    """They have no defect."""
    with pytest.raises(UncertifiableError, match="certify=direct"):
        ReceivedCertifier(FixedN(16, 256), InverseBound()).check(digits()[0], PixelThreat())
