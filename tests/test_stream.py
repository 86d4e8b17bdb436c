"""Addressed random draws, and what their discreteness costs."""

import itertools

import numpy as np
import pytest
import torch

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import STAGES, Stream, TrainingSource, sampling_slack
from gsmooth_lightning.transform import Rotation
from plans import finish


def draws(seed=3, image=5, stage="estimate", block=2, n=64):
    return Stream(seed, image).at(stage, block).normal(n)


def test_a_block_depends_on_its_address_alone():
    """The same address gives the same draws, whatever was drawn before, in whatever order."""
    addresses = list(itertools.product((0, 1), (0, 7), STAGES, (0, 1, 9)))
    forward = {a: draws(*a) for a in addresses}
    torch.manual_seed(123)
    np.random.default_rng(4).normal(size=100)
    for address in reversed(addresses):
        assert torch.equal(draws(*address), forward[address])
    source = Stream(0, 0).at("select", 0)
    first, second = source.normal(10), source.normal(10)
    again = Stream(0, 0).at("select", 0).normal(20)
    assert torch.equal(torch.cat([first, second]), again)  # one source is consumed in order


def test_different_addresses_give_different_draws():
    """Any two of many addresses share no value: seeds, images, stages, blocks, also those that differ by 2^32."""
    words = (0, 1, 2, 5, 5 + 2**32, 2**32, 2**33, 2**63)
    addresses = {(s, i, "estimate", b) for s in words for i in words for b in (0, 1, 2, 2**32)}
    addresses |= {(s, i, stage, b) for s in (0, 5) for i in (0, 5) for stage in STAGES for b in (0, 5)}
    values = torch.cat([draws(*a, n=8) for a in addresses])
    assert len(values.unique()) == len(values)


@pytest.mark.parametrize("other", [{"seed": 3 + 2**32}, {"image": 5 + 2**32}, {"seed": 5, "image": 3}, {"block": 3}])
def test_streams_that_a_32_bit_seed_would_repeat(other):
    """torch's CPU generator keeps 32 bits of its seed (seed 5 = seed 5 + 2^32); an address keeps them all."""
    assert not torch.equal(draws(), draws(**other))
    repeated = [torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32)]
    assert torch.equal(*(torch.randn(8, generator=g) for g in repeated))  # the trap exists


def test_seeds_of_more_than_64_bits():
    """Seeds that differ by 2^64 must not silently give the same votes: different draws, or a refusal."""
    try:
        beyond = draws(seed=3 + 2**64)
    except RequestError:
        return
    assert not torch.equal(draws(seed=3), beyond)


@pytest.mark.parametrize(("seed", "image"), [(-1, 0), (0, -1)])
def test_negative_addresses_are_refused(seed, image):
    with pytest.raises(RequestError, match="must lie in 0"):
        Stream(seed, image)


def test_unknown_stage():
    with pytest.raises(ValueError, match="not in tuple"):
        Stream(0, 0).at("rehearse", 0)


def test_normals_reach_beyond_float32():
    """A draw beyond 5.768, where float32 `torch.randn` stops; found by search over the blocks of Stream(0, 0)."""
    z = draws(0, 0, "estimate", 62, 1_000_000)
    assert z.dtype == torch.float64
    assert z.abs().max() == pytest.approx(6.0017374, abs=1e-6)
    assert z.mean().abs() < 5e-3  # five standard errors
    assert (z.var() - 1).abs() < 5 * np.sqrt(2e-6)


def test_normals_and_uniforms_are_finer_than_float32():
    """Hardly any of 1e5 draws is a float32 number: about 2^-29 of them would be."""
    source = Stream(1, 1).at("predict", 0)
    for values in (source.normal(100_000), source.uniform(100_000)):
        assert values.dtype == torch.float64
        assert (values.float().double() == values).sum() <= 1
        assert len(values.unique()) == len(values)
    uniform = Stream(1, 1).at("predict", 1).uniform(1000, 2)
    assert uniform.shape == (1000, 2)
    assert ((uniform >= 0) & (uniform < 1)).all()


def test_global_generators_are_untouched():
    """Drawing and voting leave torch's and NumPy's global states alone; training draws do use torch's."""
    base = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    smoothed = SmoothedClassifier(base, 3, Rotation(), None, Gaussian(10.0), Gaussian(0.2), block=8).eval()
    x = torch.full((1, 4, 4), 0.5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for stage in STAGES:
        Stream(7, 7).at(stage, 0).normal(100)
        Stream(7, 7).at(stage, 0).uniform(100)
    finish(smoothed.sample(x, Stream(0, 0), "estimate", 0, 8))
    smoothed.check_function(x)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    TrainingSource(torch.device("cpu")).normal(3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_votes_do_not_depend_on_how_they_are_split():
    """Counting 0..100 at once or in pieces, in any order, gives the same votes (blocks of 16 draws)."""
    base = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    torch.nn.init.normal_(base[1].weight, generator=torch.Generator().manual_seed(0))
    smoothed = SmoothedClassifier(base, 3, noise=Gaussian(0.5), block=16)
    x = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))

    def count(first, last):
        procedure = smoothed.sample(x, Stream(2, 9), "estimate", first, last)
        jobs = next(procedure)
        with pytest.raises(StopIteration) as ended:
            procedure.send([job() for job in jobs])
        return ended.value.value

    whole = count(0, 100)
    assert whole.sum() == 100
    assert (whole[:3] > 0).sum() >= 2  # a mixed vote, so that the comparison says something
    pieces = [count(a, b) for a, b in ((64, 100), (0, 5), (5, 16), (33, 64), (16, 33))]
    np.testing.assert_array_equal(sum(pieces), whole)


# ---------------------------------------------------------------- total-variation slack


def test_sampling_slack_formula():
    """coordinates * (26 cells + 64) * 4 * 2^-52: positive, linear in the coordinates, 0 without any."""
    assert sampling_slack(1, 100.0) == pytest.approx((2600 + 64) * 4 * 2.0**-52, rel=1e-12)
    assert sampling_slack(784, 100.0) == pytest.approx(784 * sampling_slack(1, 100.0), rel=1e-12)
    assert sampling_slack(0, 1e9) == 0
    assert 0 < sampling_slack(28 * 28, 0.5 * 65_280) < 1e-6  # what MNIST pays
    assert 0 < sampling_slack(3 * 224 * 224, 0.5 * 65_280) < 2e-4  # what ImageNet pays: less than alpha


@pytest.mark.parametrize("bits", [16, 18, 20])
@pytest.mark.parametrize("width", [0.7, 1.9, 3.65])
def test_sampling_slack_against_an_enumerated_layer(bits, width):
    """One layer of the sampler, 2^bits equally likely points of [0, width], rounded to cells: its total variation from
    the rounded uniform law, by enumeration, is below the bound's (number of cell boundaries) * (mass of a point)."""
    cells, points = 37.3, 2**bits
    index = np.rint(np.arange(points) / points * width * cells).astype(int)
    sampled = np.bincount(index) / points
    edges = np.clip((np.arange(len(sampled) + 1) - 0.5) / cells, 0, width)
    exact = np.diff(edges) / width
    distance = np.abs(sampled - exact).sum() / 2 + max(0.0, 1 - exact.sum())
    assert 0 < distance <= (width * cells + 2) / points
    assert (width * cells + 2) / points <= sampling_slack(1, cells) * 2.0**52 / points
