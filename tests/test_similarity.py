"""Rotation, scaling and translation together: the two-step bound against the exact Neyman-Pearson value of the law of
all four parameters, and against classifiers of which every probability is known."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import chi2, ncx2, norm, rice

from conftest import SMALL, one_sentence, records, run_main, run_task
from gsmooth_lightning.certify.transfer import law_transfer
from gsmooth_lightning.errors import UncertifiableError
from gsmooth_lightning.smoothing import Gaussian, Laplace
from gsmooth_lightning.smoothing.neyman_pearson import neyman_pearson
from gsmooth_lightning.smoothing.similarity import similarity_transfer
from gsmooth_lightning.transform import Similarity

SIGMA = (12.0, 0.2, 3.0)
PS = np.array([0.2, 0.5, 0.8, 0.95, 0.999])
NODES, WEIGHTS = (part / 2 for part in np.polynomial.legendre.leggauss(300))
NODES = NODES + 0.5  # on [0, 1]


def bound(p, attack, sigma=SIGMA, beside=0.0):
    """The bound for the least box that holds an attack."""
    low, high = np.minimum(attack, 0), np.maximum(attack, 0)
    return similarity_transfer(p, low, high, sigma, beside)


def exact(p: float, attack, sigma=SIGMA, beside=0.0) -> float:
    """T(p) by Neyman-Pearson in all coordinates, one integral.

    In units of the law, the log-likelihood ratio of the attacked law is a z - a^2/2 of one normal coordinate z, for r,
    s and what is beside them, and 2 s + (|u|^2 - k |u - t|^2) / 2 of the two of the translation, k = e^2s. The latter
    is (1 - k) |u - c|^2 / 2 and a constant for c = -k t / (1 - k), or linear for s = 0; |u - c| has a Rice law.
    """
    a = math.hypot(attack[0] / sigma[0], attack[1] / sigma[1], beside)
    t, k = math.hypot(attack[2], attack[3]) / sigma[2], math.exp(2 * attack[1])
    if k == 1:
        return float(norm.cdf(norm.ppf(p) - math.hypot(a, t)))
    c = abs(k * t / (1 - k))
    clean = c, 1.0, 0.0
    attacked = c + t if k < 1 else abs(c - t), 1 / math.sqrt(k), a

    def below(limit: float, apart: float, sd: float, shift: float) -> float:
        """P(a z + (1 - k) |u - c|^2 / 2 <= limit), z ~ N(shift, 1), u ~ N(., sd^2 I) with its mean `apart` from c."""
        low, high = max(0.0, apart - 9 * sd), apart + 9 * sd
        distance = low + (high - low) * NODES
        if a < 1e-9:  # no normal coordinate
            edge = math.sqrt(max(0.0, 2 * limit / (1 - k))) / sd
            return float(rice.cdf(edge, apart / sd) if k < 1 else rice.sf(edge, apart / sd))
        density = rice.pdf(distance / sd, apart / sd) / sd
        given = ndtr((limit - (1 - k) * distance**2 / 2) / a - shift)
        return float((high - low) * WEIGHTS @ (density * given))

    limit = brentq(lambda limit: below(limit, *clean) - p, -1000, 1000, xtol=1e-11)
    return below(limit, *attacked)


def plane(p, s: float, t: float) -> tuple[np.ndarray, np.ndarray]:
    """T(p) and its error from N(0, I) to N((t, 0), e^-2s I), by the quadrature over the plane."""
    spread = math.exp(-s)

    def normal(z, mean, sd):
        return -((z[:, 0] - mean) ** 2 + z[:, 1] ** 2) / (2 * sd**2) - math.log(2 * math.pi * sd**2)

    reach = 8.5 * max(1.0, spread)
    edges = [np.linspace(-reach, reach + t, 41), np.linspace(-reach, reach, 41)]
    return neyman_pearson(lambda z: normal(z, 0.0, 1.0), lambda z: normal(z, t, spread), p, edges, 1e-4)


ALONE = (1e12, 1e12, 1.0)
"""Laws of rotation and scaling so wide that an attack does not move them: the translation's law counts alone."""


@pytest.mark.parametrize("s", [-0.4, -0.1, 0.15, 0.5])
def test_the_scale_step_is_neyman_pearson_in_the_plane(s):
    """With equality: wider laws spare the middle, narrower ones the tails."""
    value, error = plane(PS, s, 0.0)
    np.testing.assert_array_less(np.abs(bound(PS, (0, s, 0, 0), ALONE) - value), error + 1e-9)
    assert error.max() < 1e-3


@pytest.mark.parametrize(("s", "t"), [(-0.3, 0.8), (0.3, 0.8), (0.1, 1.5)])
def test_the_oracle_is_neyman_pearson_in_the_plane(s, t):
    """The one integral against the quadrature: the same values for scale and shift of the translation."""
    value, error = plane(PS[1:4], s, t)
    ours = [exact(p, (0, s, t * 0.6, -t * 0.8), ALONE) for p in PS[1:4]]
    np.testing.assert_array_less(np.abs(ours - value), error + 1e-9)
    assert error.max() < 1e-3


@pytest.mark.parametrize("sigma", [SIGMA, (12.0, 5.0, 3.0)])
@pytest.mark.parametrize("beside", [0.0, 0.7])
@pytest.mark.parametrize("s", [-0.25, -0.08, 0.0, 0.08, 0.2])
@pytest.mark.parametrize("r", [0.0, 9.0])
@pytest.mark.parametrize("t", [(0.0, 0.0), (1.0, -2.0), (-8.0, 9.0)])
def test_the_bound_of_a_box_is_below_the_truth_of_every_attack_in_it(r, s, t, beside, sigma):
    attack = np.array([r, s, *t])
    for p in (0.6, 0.99):
        promised = float(bound(p, attack, sigma, beside))
        for share in ((1, 1, 1), (-1, 1, -1), (1, 0.5, 1), (1, 0, 1), (0, 1, 0), (0, 1, 1)):
            inside = attack * np.array([abs(share[0]), share[1], abs(share[2]), abs(share[2])])
            assert promised <= exact(p, inside, sigma, beside) + 1e-10
        if s == 0:
            assert promised == pytest.approx(exact(p, attack, sigma, beside), abs=1e-12)


def test_both_sides_of_an_asymmetric_box_count():
    """Over a whole box, with s on both sides of 0 and the attacks at its corners, sides and inside."""
    low, high = np.array([-8.0, -0.2, -1.0, -2.5]), np.array([5.0, 0.12, 2.0, 0.5])
    promised = similarity_transfer(0.97, low, high, SIGMA)
    truth = [
        exact(0.97, np.maximum(shares, 0) * high - np.minimum(shares, 0) * low)
        for shares in itertools.product((-1.0, 1.0), (-1.0, -0.5, 0.0, 0.5, 1.0), (-1.0, 0.0, 1.0), (-1.0, 1.0))
    ]
    assert promised <= min(truth)
    assert promised > min(truth) - 0.15


def test_plain_addition_of_the_parameters_promises_too_much():
    """The negative control: the gauge of an additive transformation is above the truth."""
    found = []
    for s in (-0.4, 0.4):
        attack = (0.0, s, 2.0, 2.0)
        gauge = math.hypot(s / 2.0, math.hypot(2, 2) / SIGMA[2])
        found.append(float(norm.cdf(norm.ppf(0.95) - gauge)) - exact(0.95, attack, (12.0, 2.0, 3.0)))
    assert max(found) > 0.02


@pytest.mark.parametrize(("p", "attack", "most"), [(0.7, (6, 0.2, 1, 0), 0.08), (0.95, (6, -0.2, 3, 0), 0.12)])
def test_either_order_counts(p, attack, most):
    """What is lost against the truth; the other order, shift first and variance first, would lose a third more."""
    assert 0 < exact(p, attack) - bound(p, attack) < most


def test_it_is_close_to_the_truth():
    """At pA = .99 the radius in pixels at 10 degrees and a factor of 1.1, and at most what is lost against it."""

    def radius(left):
        return brentq(lambda t: float(left(0.99, (10.0, math.log(1.1), t, 0.0))) - 0.5, 0.5, 12)

    assert radius(bound) < radius(exact) < 1.2 * radius(bound)


def inverse(attack) -> np.ndarray:
    """A^-1, (2, 2), by columns of what the transformation resolves to."""
    alpha = torch.tensor([attack] * 2, dtype=torch.float64)
    beta = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    return (Similarity().resolve(alpha, beta)[:, 2:] - alpha[:, 2:]).numpy().T


def test_the_attacked_law_is_the_one_of_the_transformation():
    """resolve(alpha, theta) of theta ~ N: mean alpha, covariance e^-2s s_t^2 I of the translation."""
    for attack in ((30.0, 0.3, 1.0, 2.0), (-75.0, -0.5, 0.0, 1.0)):
        linear = inverse(attack)
        np.testing.assert_allclose(linear @ linear.T, np.eye(2) * math.exp(-2 * attack[1]), atol=1e-12)
        alpha = torch.tensor([attack], dtype=torch.float64)
        resolved = Similarity().resolve(alpha, torch.tensor([[5.0, 0.7, 0.0, 0.0]], dtype=torch.float64))
        torch.testing.assert_close(resolved - alpha, torch.tensor([[5.0, 0.7, 0.0, 0.0]], dtype=torch.float64))


def test_half_spaces_and_balls_keep_what_is_promised():
    """Classifiers of the resolved parameters: their probabilities before and after are known, through A itself."""
    generator = np.random.default_rng(0)
    scales = np.array([SIGMA[0], SIGMA[1], SIGMA[2], SIGMA[2]])
    closest = 1.0
    for _ in range(300):
        attack = generator.uniform(-1, 1, 4) * [12, 0.25, 3, 3]
        w, limit = generator.normal(size=4) / scales, generator.normal()
        back = scales * np.concatenate([w[:2], inverse(tuple(attack)).T @ w[2:]])
        p = norm.cdf(limit / np.linalg.norm(w * scales))
        left = norm.cdf((limit - w @ attack) / np.linalg.norm(back))
        assert left >= bound(p, attack) - 1e-12
        closest = min(closest, left - bound(p, attack))

        centre, size = generator.normal(size=2) * 2, generator.uniform(1, 8)
        spread = math.exp(-attack[1]) * SIGMA[2]
        before = ncx2.cdf((size / SIGMA[2]) ** 2, 2, (np.linalg.norm(centre) / SIGMA[2]) ** 2)
        after = ncx2.cdf((size / spread) ** 2, 2, (np.linalg.norm(attack[2:] - centre) / spread) ** 2)
        for p, left in ((before, after), (1 - before, 1 - after)):
            assert left >= bound(p, attack) - 1e-9
    assert closest < 0.02


def test_the_classifiers_that_meet_the_bound():
    """A half-space without scaling; a disc, or what is outside it, under scaling alone."""
    attack = np.array([5.0, 0.0, 1.5, -2.0])
    direction = attack / np.array([SIGMA[0], SIGMA[1], SIGMA[2], SIGMA[2]])
    assert float(bound(0.9, attack)) == pytest.approx(norm.cdf(norm.ppf(0.9) - np.linalg.norm(direction)), abs=1e-12)
    for s in (-0.4, 0.3):
        disc = chi2(2).cdf(4.0), chi2(2, scale=math.exp(-2 * s)).cdf(4.0)
        p, left = disc if s < 0 else (1 - disc[0], 1 - disc[1])
        assert float(bound(p, (0, s, 0, 0), ALONE)) == pytest.approx(left, abs=1e-12)


def test_ends_and_monotony():
    """0 and 1 stay, p is never exceeded, larger boxes and less of p leave less."""
    p = np.concatenate([[0, 1e-300, 1e-16], np.linspace(0.001, 0.999, 99), [1 - 1e-16, 1]])
    left = bound(p, (3.0, 0.1, 1.0, 1.0))
    assert (left[0], left[-1]) == (0, 1)
    assert np.isfinite(left).all()
    assert (left <= p + 1e-15).all()
    assert (np.diff(left) >= -1e-15).all()
    for larger in ((6.0, 0.1, 1, 1), (3, 0.2, 1, 1), (3, 0.1, 2, 1), (3, 0.1, 1, -2)):
        assert (bound(p, larger) <= left).all()
    assert (similarity_transfer(p, (0, -0.3, 0, 0), (3, 0.1, 1, 1), SIGMA) <= left).all()


# ---------------------------------------------------------------- in the certificates

BOX = (-8.0, -0.1, -1.0, -2.0), (8.0, 0.12, 1.0, 2.0)


def test_certificates_take_it_with_the_defect():
    """E is one more coordinate of the shift; as a step of its own it would leave less."""
    law = Gaussian([SIGMA[0], SIGMA[1], SIGMA[2], SIGMA[2]])
    without, left = (law_transfer(Similarity(), law, *BOX, error)(PS) for error in (0.0, 0.8))
    np.testing.assert_array_equal(without, similarity_transfer(PS, *BOX, SIGMA))
    assert (left < without).all()
    assert (left > norm.cdf(norm.ppf(without) - 0.8)).all()
    for corner in itertools.product(*zip(*BOX, strict=True)):
        assert (left <= [exact(p, corner, beside=0.8) for p in PS]).all()


def test_one_sigma_is_for_all_parameters():
    np.testing.assert_array_equal(
        law_transfer(Similarity(), Gaussian(2.0), *BOX)(PS), similarity_transfer(PS, *BOX, (2.0, 2.0, 2.0))
    )


@pytest.mark.parametrize(
    "law",
    [
        Gaussian([12.0, 0.2, 3.0, 3.1]),
        Gaussian([12.0, 0.2, 3.0]),
        Gaussian(covariance=torch.eye(4)),
        Laplace(2.0),
    ],
)
def test_laws_without_the_theorem_are_refused(law):
    with pytest.raises(UncertifiableError, match=r"law\.sigma=\[DEGREES,LOG_FACTOR,PIXELS,PIXELS\]"):
        law_transfer(Similarity(), law, *BOX)


def test_certified_from_the_command_line(checkpoint, here):
    """`gsmooth certify threat=similarity`: radii are shares of the range; a translation law that a turn would change is
    refused."""
    kept = [o for o in SMALL if not o.startswith(("law", "threat", "images", "error.points"))]
    command = (*kept, "threat=similarity", "transform=similarity", "images.first=2")
    given = (f"checkpoint={checkpoint}", "store=run")
    one_sentence(run_main("certify", *command, *given, "law.sigma=[20,0.3,3,3]"), "error.search=grid")
    command = (*command, "error.search=grid", "error.points=81")
    folder = run_task("certify", *command, *given, "law.sigma=[20,0.3,3,3]")
    found = records(folder)
    assert {r["unit"] for r in found} == {"share of the range"}
    assert all(0 <= r["radius"] <= 1 for r in found)
    assert all(r["details"]["E"] > 0 for r in found)
    one_sentence(run_main("certify", *command, *given, "law.sigma=[20,0.3,3,2]"), "the last two alike")
    for sigma, words in (
        ("[20,0.3]", "give one for each"),
        ("20", "one number for each"),
    ):  # degrees are no log factors
        one_sentence(run_main("certify", *command, *given, f"law.sigma={sigma}"), "4 parameters", words)
