"""The nested certificate: published numbers, closed forms, exact error rates of its layers, attacks and refusals."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom, norm

from conftest import SMALL, one_sentence, records, run_main, run_task
from gsmooth_lightning.certify import FixedN, GroupSequential, NestedCertifier, PercentileCertifier
from gsmooth_lightning.certify.nested import _decide
from gsmooth_lightning.certify.transfer import largest_radius, required
from gsmooth_lightning.confidence import clopper_pearson_lower
from gsmooth_lightning.error import Bound, ImageBound
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.plans import SoftVotes
from gsmooth_lightning.rounds import together
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, gaussian_by_part, partition_masks
from gsmooth_lightning.smoothing.similarity import similarity_transfer
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.transform import Additive, Rotation, Similarity
from plans import Given, finish


def nested(bound, plan, inner, form="clean"):
    return NestedCertifier(plan, inner, Given(bound), form)


def radius_of(p, alpha_inner, rho, sigma, form, reach=1e6):
    """The certified radius for a bound p of the outer votes, without the sampler's slack."""
    bound = Bound(0.5, rho, 0.0, "sound")
    certifier = nested(bound, FixedN(20, 200), FixedN(64, 200, alpha_inner), form)
    smoothed = SmoothedClassifier(torch.nn.Identity(), 2, Rotation(), None, Gaussian(sigma), Gaussian(0.5))
    threat = TransformationThreat(Rotation(), -reach, reach)
    transfer = certifier.transfer(smoothed, threat, bound, 1, 0.0)
    return largest_radius(transfer, p, 1 - p, reach), transfer


# ---------------------------------------------------------------- the numbers in print


@pytest.mark.parametrize(
    ("n", "q", "sigma", "printed"),
    [(50, 0.9921, 10, 10.806), (50, 0.9828, 10, 10.397), (50, 0.9641, 10, 9.624), (300, 0.9921, 10, 18.295)],
)
def test_fischers_radii(n, q, sigma, printed):
    """Fischer et al. 2020, Table 2: sigma z(alpha^(1/n) - (1 - q_E) - .003), all n votes robust, alpha = .001. The .003
    is alpha_eps and the confidence of q_E."""
    p = float(clopper_pearson_lower(n, n, 1e-3))
    assert p == pytest.approx(1e-3 ** (1 / n), abs=1e-9)
    radius, _ = radius_of(p, 0.003, 1 - q, sigma, "published")
    assert radius == pytest.approx(printed, abs=5.1e-4)
    assert radius <= sigma * norm.ppf(p - (1 - q) - 0.003)


def test_fischers_unclipped_radius():
    """90 z(.001^(1/200) - .0075 - .003) = 153.111; clipped to the range when it is 90."""
    p = float(clopper_pearson_lower(200, 200, 1e-3))
    assert radius_of(p, 0.003, 0.0075, 90, "published")[0] == pytest.approx(153.111, abs=5.1e-4)
    assert radius_of(p, 0.003, 0.0075, 90, "published", reach=90.0)[0] == 90


def test_the_clean_form_is_tighter():
    """n = 200, rho_E = .0079, alpha_eps = .001: 1.719 -> 1.805 sigma. (theory.md section 6 prints 1.793, which is
    z(p' - alpha_eps) - z(1/2 + rho_E): without the division by 1 - alpha_eps.)"""
    p = float(clopper_pearson_lower(200, 200, 1e-3))
    for form, expected in (("published", 1.719), ("clean", 1.8054)):
        found = radius_of(p, 1e-3, 0.0079, 1.0, form)[0]
        assert found == pytest.approx(expected, abs=6e-4)
    assert norm.ppf(p - 1e-3) - norm.ppf(0.5079) == pytest.approx(1.793, abs=6e-4)
    for p in (0.6, 0.8, 0.95, 0.999):
        for rho in (0.001, 0.05):
            clean = radius_of(p, 1e-3, rho, 1.0, "clean")[0] or 0.0
            assert clean >= (radius_of(p, 1e-3, rho, 1.0, "published")[0] or 0.0)


def test_closed_forms_of_both_radii():
    for p, a, rho in ((0.9, 0.01, 0.02), (0.99, 1e-3, 0.1), (0.7, 0.05, 0.0)):
        clean, transfer = radius_of(p, a, rho, 3.0, "clean")
        expected = 3 * (norm.ppf((p - a) / (1 - a)) - norm.ppf(0.5 + rho))
        assert clean == pytest.approx(expected, abs=1e-7)
        assert clean <= expected
        assert required(transfer, clean) == pytest.approx(p, abs=1e-7)
        published, _ = radius_of(p, a, rho, 3.0, "published")
        assert published == pytest.approx(3 * norm.ppf(p - a - rho), abs=1e-7)
    assert radius_of(0.5, 1e-3, 0.0, 1.0, "clean")[0] is None
    assert radius_of(0.99, 1e-3, 0.5, 1.0, "clean")[0] == 0  # the prediction alone


@pytest.mark.parametrize("form", ["clean", "published"])
@pytest.mark.parametrize("rho", [0.0, 0.01, 0.1])
def test_no_adversary_flips_within_the_radius(form, rho):
    """The worst case in full: half-lines of robust theta, an alpha_eps share of the others that passes its test, all of
    which vote otherwise under attack, and a rho_E mass of robust ones taken away after the shift."""
    alpha = 0.02
    for p in np.linspace(0.55, 0.999, 12):
        radius, _ = radius_of(p, alpha, rho, 1.0, form)
        if radius is None:
            continue
        robust = (p - alpha) / (1 - alpha)  # p = robust + alpha (1 - robust)
        left = norm.cdf(norm.ppf(robust) - radius) - (rho if radius > 0 else 0.0)
        assert left >= 0.5 - 1e-12


def test_the_published_form_is_refused_where_parameters_do_not_add():
    """Rotation, scaling and translation together: at the p' from which the published form would certify, less than half
    is left of the robust theta (rho inside needs a T of slope 1 or more, which a change of variance has not)."""
    sigma, rho, alpha = (30.0, 10.0, 4.0), 0.05, 1e-3
    low = high = (0.0, -0.1, 0.0, 0.0)

    def left(p):
        return float(similarity_transfer(p, low, tuple(-v for v in high), sigma))

    p = brentq(lambda p: left(p - alpha - rho) - 0.5, 0.5, 0.9)
    assert left((p - alpha) / (1 - alpha)) - rho < 0.5
    law = Gaussian([30.0, 10.0, 4.0, 4.0])
    smoothed = SmoothedClassifier(torch.nn.Identity(), 2, Similarity(), None, law, Gaussian(0.5))
    threat = TransformationThreat(Similarity(), [0, -0.1, 0, 0], [1, 0, 0, 0])
    bound = Bound(0.5, rho, 0.0, "sound")
    nested(bound, FixedN(20, 200), FixedN(64, 200), "clean").check(smoothed, threat)
    with pytest.raises(UncertifiableError, match="parameters that add"):
        nested(bound, FixedN(20, 200), FixedN(64, 200), "published").check(smoothed, threat)


# ---------------------------------------------------------------- layers: exact error rates


class Coin(torch.nn.Module):
    """Class 0 where the one pixel's noise is below a threshold: a coin with known bias."""

    def __init__(self, p, sigma):
        super().__init__()
        self.cut = 0.5 + sigma * norm.ppf(p)

    def forward(self, x):
        value = x.flatten(1)[:, 0]
        return torch.stack([self.cut - value, value - self.cut], 1)


class Still(Additive):
    """Parameters that change nothing."""

    units, name, exact = ("units",), "still", False

    def forward(self, x, theta):
        return x + 0 * theta[:, :, None, None]


SIGMA = 0.1
X = torch.full((1, 1, 2), 0.5)


def coin(p, **options):
    return SmoothedClassifier(
        Coin(p, SIGMA), 2, Still(), None, Gaussian(1.0), Gaussian(SIGMA), block=16, **options
    ).eval()


@pytest.mark.parametrize("plan", [FixedN(16, 100, 0.05), GroupSequential([1], 16, 400, 0.05)])
def test_a_test_of_robustness_errs_as_often_as_alpha_says(plan):
    """A coin at the threshold passes with probability alpha at most: 600 decisions, exact binomial tolerance 1e-6; one
    well above passes nearly always."""
    e = 0.8
    for p, least, most in ((norm.cdf(e), 0, binom.isf(1e-6, 600, 0.05)), (0.93, 500, 600)):
        smoothed = coin(p)
        certifier = nested(Bound(e, 0.0, 0.0, "sound"), FixedN(2, 20), plan)
        layers = certifier.layers(Bound(e, 0.0, 0.0, "sound"), partition_masks(None, (1, 1, 2)), 0.0)
        y = smoothed.encode(X[None], torch.zeros(1, 1))[0]
        decided = (_decide(smoothed, y, layers, Stream(0, i), lambda n: None) for i in range(600))
        passed = sum(c == 0 for c in finish(together(decided, 64)))
        assert least <= passed <= most


def test_thresholds_of_layers():
    """q > Phi(E) for the innermost layer; further out, false passes of the next layer count."""
    bound = Bound(1.0, 0.0, 0.0, "sound", {}, (0.6, 0.8))
    certifier = nested(bound, FixedN(2, 20), [FixedN(8, 50, 0.01), FixedN(8, 60, 0.03)])
    certifier.error.partition = "halves"
    outer, inner = certifier.layers(bound, partition_masks("halves", (1, 4, 4)), 1e-6)
    assert outer.threshold == pytest.approx(0.03 + 0.97 * norm.cdf(0.6) + 1e-6, abs=1e-15)
    assert inner.threshold == pytest.approx(norm.cdf(0.8) + 1e-6, abs=1e-15)
    assert (outer.plan.n, inner.plan.n) == (50, 60)
    assert outer.mask[0, 0].tolist() == [True, True, False, False]
    with pytest.raises(RequestError, match="2 parts"):
        nested(bound, FixedN(2, 20), [FixedN(8, 50)] * 3).layers(bound, partition_masks("halves", (1, 4, 4)), 0.0)


class TwoHalves(torch.nn.Module):
    """Class 0 where left pixel < a and right pixel < b."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        flat = x.flatten(1)
        inside = (flat[:, 0] < self.a) & (flat[:, 1] < self.b)
        return torch.stack([inside.float(), 1 - inside.float()], 1)


def test_two_layers_against_the_closed_form():
    """Left noise outside, right noise inside. For each left draw below a the right coin has bias Phi((b - .5) / sigma),
    robust within E_R if that exceeds Phi(E_R): then the left share is Phi((a - .5) / sigma)."""
    plan = FixedN(16, 200, 1e-3)
    e_left, e_right = 1.0, 0.5

    def found(left, right):
        smoothed = SmoothedClassifier(
            TwoHalves(0.5 + SIGMA * left, 0.5 + SIGMA * right),
            2,
            Still(),
            None,
            Gaussian(1.0),
            Gaussian(SIGMA),
            block=16,
        ).eval()
        bound = Bound(math.hypot(e_left, e_right), 0.0, 0.0, "sound", {}, (e_left, e_right))
        certifier = nested(bound, FixedN(2, 20), plan)
        certifier.error.partition = "halves"
        layers = certifier.layers(bound, partition_masks("halves", (1, 1, 2)), 0.0)
        y = smoothed.encode(X[None], torch.zeros(1, 1))[0]
        return finish(_decide(smoothed, y, layers, Stream(1, 1), lambda n: None))

    assert found(1.8, 1.4) == 0  # robust on both sides
    assert found(0.9, 1.4) == 2  # not on the left
    assert found(1.8, 0.4) == 2  # not on the right


# ---------------------------------------------------------------- the whole certifier


class HalfSpace(torch.nn.Module):
    """Class 0 where the mean pixel is below a cut."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def forward(self, x):
        value = x.flatten(1).mean(1)
        return torch.stack([self.cut - value, value - self.cut], 1)


class Brighten(Additive):
    """x + theta, computed as an inexact transformation."""

    units, name, exact = ("units",), "brighten", False

    def forward(self, x, theta):
        return x + theta[:, :, None, None]


def half_space(cut, block=64):
    """mean(x + theta + eps) < cut on 4 pixels: eps has sigma / 2 in the mean."""
    return SmoothedClassifier(HalfSpace(cut), 2, Brighten(), None, Gaussian(0.1), Gaussian(SIGMA), block=block).eval()


SQUARE = torch.full((1, 2, 2), 0.5)


@pytest.mark.parametrize("form", ["clean", "published"])
def test_the_whole_certifier_on_a_half_space(form):
    """A theta is robust within E where .5 + theta + E sigma / 2 < cut: a known share of robust theta; the nested radius
    lies below the distance at which the exact nested classifier flips, and the inner draws are counted."""
    e, cut = 0.5, 0.75
    threat = TransformationThreat(Brighten(), -0.4, 0.4, saved="real")
    smoothed = half_space(cut)
    plan, inner = FixedN(32, 400, 1e-3), FixedN(64, 192, 1e-3)
    certifier = nested(Bound(e, 0.001, 1e-4, "sound"), plan, inner, form)
    ((_, certificate),) = certifier.certify(smoothed, threat, [(0, SQUARE)])
    robust = norm.cdf((cut - 0.5 - e * SIGMA / 2) / 0.1)
    assert certificate.prediction == 0
    assert certificate.counts[0] <= binom.isf(1e-7, 400, robust) + 0.001 * 400 + 5
    assert 0 < certificate.radius < cut - 0.5  # the exact nested classifier flips where .5 + gamma = cut
    assert certificate.radius > 0.5 * (cut - 0.5)
    assert certificate.evaluations == (32 + 400) * (64 + 192)
    assert certificate.alpha == pytest.approx(1.1e-3)
    assert certificate.details["form"] == form
    assert certificate.guarantee == "sound"
    again = next(certifier.certify(smoothed, threat, [(0, SQUARE)]))[1]
    assert again.counts == certificate.counts


def test_sequential_layers_decide_the_same_with_fewer_draws():
    threat = TransformationThreat(Brighten(), -0.4, 0.4, saved="real")
    smoothed, bound = half_space(0.8), Bound(0.5, 0.0, 0.0, "sound")
    fixed = nested(bound, FixedN(32, 512), FixedN(64, 1024))
    early = nested(bound, GroupSequential([0.05, 0.1], 32, 512), GroupSequential([1], 64, 1024))
    ((_, slow),) = fixed.certify(smoothed, threat, [(0, SQUARE)])
    ((_, fast),) = early.certify(smoothed, threat, [(0, SQUARE)])
    assert slow.radius >= 0.1
    assert (fast.prediction, fast.radius) == (0, 0.1)
    assert fast.evaluations < slow.evaluations / 8


def test_hopeless_images_cost_no_inner_draws():
    """E beyond what the inner plan can show: every draw abstains at once."""
    threat = TransformationThreat(Brighten(), -0.4, 0.4, saved="real")
    certifier = nested(Bound(5.0, 0.0, 0.0, "sound"), FixedN(32, 128), FixedN(64, 128))
    ((_, certificate),) = certifier.certify(half_space(0.9), threat, [(0, SQUARE)])
    assert (certificate.prediction, certificate.evaluations) == (-1, 0)
    assert sum(certificate.counts) == 0


def test_votes_do_not_depend_on_what_else_is_in_flight():
    threat = TransformationThreat(Brighten(), -0.4, 0.4, saved="real")
    certifier = nested(Bound(0.5, 0.0, 0.0, "sound"), FixedN(16, 64), GroupSequential([1], 64, 512))
    images = [(i, torch.full((1, 2, 2), 0.5 + 0.04 * i)) for i in range(4)]
    alone = {i: next(certifier.certify(half_space(0.7), threat, [(i, x)]))[1].counts for i, x in images}
    side = {i: c.counts for i, c in certifier.certify(half_space(0.7), threat, images, in_flight=4)}
    assert alone == side
    assert len({tuple(c) for c in side.values()}) > 1


def test_inner_draws_have_addresses_of_their_own():
    """No two of: outer draws, and the draws within different outer draws, stages and depths."""
    stream = Stream(3, 7)
    streams = [stream]
    for stage in ("select", "estimate"):
        for draw in (0, 1, 2**33):
            inner = stream.within(stage, draw)
            streams += [inner, inner.within("select", 0), inner.within("estimate", draw)]
    first = {float(s.at(stage, b).normal(1)) for s in streams for stage in ("select", "estimate") for b in (0, 1)}
    assert len(first) == 4 * len(streams)


# ---------------------------------------------------------------- refusals


def test_refusals():
    threat = TransformationThreat(Brighten(), -0.4, 0.4, saved="real")
    smoothed, bound = half_space(0.8), Bound(0.5, 0.0, 0.0, "sound")
    for plan, inner in ((FixedN(8, 64, bounds="two"), FixedN(8, 64)), (FixedN(8, 64), FixedN(8, 64, bounds="two"))):
        with pytest.raises(UncertifiableError, match="may vote for another class"):
            nested(bound, plan, inner).check(smoothed, threat)
    with pytest.raises(UncertifiableError, match="soft rho belongs to the joint"):
        NestedCertifier(FixedN(8, 64), FixedN(8, 64), ImageBound(search="grid")).check(smoothed, threat)
    NestedCertifier(FixedN(8, 64), FixedN(8, 64), ImageBound(search="grid", soft=False)).check(smoothed, threat)
    with pytest.raises(UncertifiableError, match="error=image_hard"):
        NestedCertifier(FixedN(8, 64), FixedN(8, 64), None).check(smoothed, threat)
    with pytest.raises(UncertifiableError, match="certify=direct"):
        nested(bound, FixedN(8, 64), FixedN(8, 64)).check(smoothed, PixelThreat())
    with pytest.raises(UncertifiableError, match="out of reach"):
        nested(bound, GroupSequential([0.1, 0.39], 8, 16), FixedN(8, 64)).check(smoothed, threat)
    with pytest.raises(RequestError, match="clean, published"):
        nested(bound, FixedN(8, 64), FixedN(8, 64), form="corrected")
    for inner in (SoftVotes(8, 64), GroupSequential([0.5, 1], 8, 64)):
        with pytest.raises(RequestError, match=r"certify\.inner must be"):
            nested(bound, FixedN(8, 64), inner)
    soft = half_space(0.8)
    soft.votes = "soft"
    for plan, classifier in ((SoftVotes(8, 64), smoothed), (FixedN(8, 64), soft), (SoftVotes(8, 64), soft)):
        with pytest.raises(UncertifiableError, match="votes=hard"):
            nested(bound, plan, FixedN(8, 64)).check(classifier, threat)
    with pytest.raises(RequestError, match="network's own outputs"):  # E is paid for by tests that no median makes
        PercentileCertifier(nested(bound, FixedN(8, 64), FixedN(8, 64)), 0.1)
    certifier = nested(bound, FixedN(8, 64), FixedN(8, 64))
    certifier.top_k = 2
    with pytest.raises(UncertifiableError, match="no other class"):
        certifier.verdict(None, None, 1.0)


# ---------------------------------------------------------------- partitions


def test_masks_are_partitions():
    for partition, parts in (("halves", 2), ("quadrants", 4), ("channels", 3)):
        for shape in ((3, 4, 4), (3, 5, 7)):
            masks = partition_masks(partition, shape)
            assert masks.shape == (parts, *shape)
            assert (masks.sum(0) == 1).all()
    left, right = partition_masks("halves", (1, 2, 5))
    assert left.sum() == 4
    assert right.sum() == 6
    assert partition_masks("quadrants", (1, 2, 2)).flatten(1).tolist() == torch.eye(4).bool().tolist()
    assert partition_masks(None, (7,)).tolist() == [[True] * 7]
    with pytest.raises(RequestError, match="halves, quadrants, channels"):
        partition_masks("thirds", (1, 2, 2))
    with pytest.raises(RequestError, match="for images"):
        partition_masks("halves", (1, 16))


def test_one_sigma_for_each_part():
    """The Mahalanobis norm of a defect with a diagonal Sigma_eps is the root-sum-square over the parts."""
    noise = gaussian_by_part("halves", [0.5, 0.25], (1, 2, 4))
    defect = torch.randn(3, 1, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = defect[..., :2].flatten(1).norm(dim=1), defect[..., 2:].flatten(1).norm(dim=1)
    torch.testing.assert_close(noise.gauge(defect), torch.hypot(left / 0.5, right / 0.25))
    with pytest.raises(RequestError, match="need 2 sigmas, got 3"):
        gaussian_by_part("halves", [0.5] * 3, (1, 2, 4))


@pytest.mark.parametrize(
    "options",
    [
        ("error=image_hard", "error.partition=halves"),
        ("error=distribution", "error.partition=halves", "error.rho=0.5", "error.alpha_inner=0.05"),
        (
            "error=image_hard",
            "transform=translation",
            "threat=translation",
            "law.sigma=2",
            "threat.low=-1",
            "threat.high=1",
        ),
        ("error=pooled", "noise=by_part", "noise.sigma=[0.25,0.25]", "error.calibration=6"),
    ],
)
def test_nested_from_the_command_line(checkpoint, here, options):
    """`gsmooth certify certify=nested` with partitions, a bound for all images, two parameters and a diagonal sigma."""
    kept = [o for o in SMALL if not o.startswith(("error.", "sampling.n", "images"))]
    if "transform=translation" in options:
        kept = [o for o in kept if not o.startswith("threat")]
    elif "noise=by_part" in options:
        kept = [o for o in kept if not o.startswith("noise")]
    small = [
        "certify=nested",
        "sampling.n0=2",
        "sampling.n=12",
        "certify.inner.n0=8",
        "certify.inner.n=16",
        "images.first=1",
    ]
    if "error=image_hard" in options:
        small += ["error.draws=16", "error.choose=16"]
    elif "error=distribution" in options:
        small += ["error.draws=16", "error.calibration=6", "error.search=grid", "error.points=2"]
    if "error=distribution" in options:
        small += ["certify.inner.n=32"]  # enough votes for E: the layers are really drawn
    folder = run_task("certify", *kept, *options, *small, f"checkpoint={checkpoint}", "store=run")
    (record,) = records(folder)
    parts = 2 if "error.partition=halves" in options else 1
    assert len(record["details"]["E_parts"]) == parts
    assert record["details"]["E"] == pytest.approx(np.linalg.norm(record["details"]["E_parts"]), rel=1e-9)
    assert record["n"] == 12
    if "error=distribution" in options:  # (2 + 12) (8 + 32) draws, two blocks of 64 within each
        assert record["evaluations"] == 14 * 40 * 128
    assert record["guarantee"] == ("sound" if "error=image_hard" in options else "heuristic")
    one_sentence(run_main("report", f"stores={folder}", "bounds=two"), "bounds=binary")
    one_sentence(run_main("report", f"stores={folder}", "top_k=2"), "top_k=1")
