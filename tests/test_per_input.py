"""A sigma for each input: regions of different predictions never meet, and the memory answers as it certified."""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import QUIET, one_sentence, records, run_main, run_task, timeless
from ellipsoids import meeting
from gsmooth_lightning.certify import AdditiveCertifier, Certificate, PerInputCertifier
from gsmooth_lightning.certify.per_input import Kept
from gsmooth_lightning.certify.store import Store, read
from gsmooth_lightning.errors import RequestError, UncertifiableError
from gsmooth_lightning.lit import CertificationModule
from gsmooth_lightning.model.fused import Compiled
from gsmooth_lightning.plans import ConfidenceSequence, FixedN, GroupSequential, SoftVotes
from gsmooth_lightning.preprocess import GaussianLowPass, Preprocess
from gsmooth_lightning.report.curves import by_area, chosen
from gsmooth_lightning.report.tables import certificate_rows
from gsmooth_lightning.smoothed import LEVELS, SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian, Laplace, LowRankGaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.threat import PixelThreat, TransformationThreat
from gsmooth_lightning.train import CertifiedArea, Scales
from gsmooth_lightning.transform import Brightness

L2 = PixelThreat()
FLOATS = PixelThreat(saved="float")
PLAN = FixedN(n0=16, n=100)
PIXELS = partial(Scales, tied=[1, 1, 1])


# ---------------------------------------------------------------- a small classifier, attacked by brute force


ISLANDS = ((0.2, 0.2), (0.5, 0.8), (0.8, 0.3), (0.2, 0.6), (0.55, 0.45), (0.85, 0.75))


class Net(nn.Module):
    """Logits of two pixels: round islands of classes 1 and 2 in a sea of class 0, which much noise does not see."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.tensor(ISLANDS))

    def forward(self, x: Tensor) -> Tensor:
        near = 0.1 - (x.flatten(1)[:, None] - self.centres).norm(dim=2)
        return torch.cat([torch.zeros(len(x), 1), 40 * near.view(-1, 2, 3).amax(2)], 1)


def classifier(base: nn.Module | None = None, sigma: float = 0.03, **options: Any) -> SmoothedClassifier:
    return SmoothedClassifier(base or Net(), 3, noise=Gaussian(sigma), block=50, **options).eval()


def certifier(plan: FixedN = PLAN, steps: int = 5, lr: float = 0.5) -> PerInputCertifier:
    return PerInputCertifier(plan, CertifiedArea(n0=8), PIXELS, steps, lr)


def pixels(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1)


def scattered(seed: int = 0) -> list[tuple[int, Tensor]]:
    """40 images of two pixels, the first near the islands' centres."""
    rng = np.random.default_rng(seed)
    places = np.concatenate([rng.normal(ISLANDS, 0.02), rng.uniform(0, 1, (34, 2))])
    return [(i, L2.prepare(pixels(*place)[None])[0]) for i, place in enumerate(places)]


def run(own: PerInputCertifier, images: Iterable[tuple[int, Tensor]], **options: Any) -> dict[int, Certificate]:
    return {i: replace_seconds(c) for i, c in own.certify(classifier(**options), L2, images)}


def replace_seconds(certificate: Certificate) -> Certificate:
    object.__setattr__(certificate, "seconds", 0.0)
    return certificate


def sigma_of(details: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(details["sigma"]), np.float32).astype(float)


def covered(own: Sequence[Kept], points: Tensor) -> Tensor:
    """Which regions hold each point: (regions, points)."""
    return torch.stack([((points - k.x.flatten()) / k.sigma.flatten()).norm(dim=1) <= k.size for k in own])


def grid(n: int = 400) -> Tensor:
    axis = torch.linspace(-0.5, 1.5, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


@pytest.fixture(scope="module")
def crowd() -> tuple[PerInputCertifier, dict[int, Certificate]]:
    """The scattered images, certified one after the other."""
    own = certifier()
    return own, run(own, scattered())


def test_no_point_lies_in_regions_of_two_predictions(crowd):
    """On a fine grid, and at every centre; without the memory many points would (the sizes that the votes show)."""
    own, found = crowd
    classes = torch.tensor([k.prediction for k in own.memory])
    assert set(classes.tolist()) == {0, 1, 2}
    points = torch.cat([grid(), torch.stack([k.x.flatten() for k in own.memory])])
    unshrunk = [
        Kept(k.x, k.sigma, float(Gaussian(1.0).radius(c.pa, c.pb)), k.prediction)
        for k, c in zip(own.memory, (c for c in found.values() if "sigma" in c.details), strict=True)
    ]

    def contested(regions: list[Kept]) -> int:
        hit = covered(regions, points)
        return int((sum(hit[classes == c].any(0).int() for c in range(3)) > 1).sum())

    assert contested(own.memory) == 0
    assert contested(unshrunk) > 500
    assert any(c.details.get("recalled") for c in found.values())


def test_later_inputs_in_a_region_get_its_prediction(crowd):
    """Random inputs in each certificate's ball, those of what is left around recalled inputs included, are recalled
    with its prediction; no vote is counted."""
    own, found = crowd
    rng, places = np.random.default_rng(5), dict(scattered())
    attacked = []
    for index, certificate in found.items():
        place = places[index].double()
        for _ in range(4):
            step = torch.from_numpy(rng.normal(size=place.shape))
            x = (place + certificate.radius * (1 - 1e-6) * step / step.norm()).float()
            inside = (x.double() - place).norm() <= certificate.radius  # in spite of float32
            if inside and certificate.radius and x.min() >= 0 and x.max() <= 1:
                attacked.append((certificate.prediction, x))
    assert len(attacked) > 80
    later = certifier()
    later.memory = list(own.memory)
    images = [(1000 + k, x) for k, (_, x) in enumerate(attacked)]
    for (prediction, _), (_, answer) in zip(attacked, later.certify(classifier(), FLOATS, images), strict=True):
        assert (answer.prediction, answer.evaluations, answer.n) == (prediction, 0, 0)
        assert answer.details["recalled"]
        assert answer.guarantee == "order-dependent"
    assert later.memory == own.memory


def test_numbers_of_the_shrunk_region(crowd):
    """Radius, axes, area and linf ball are of the region that is remembered (theory.md section 10), not of that which
    the votes show; of a recalled input they are of what is left."""
    own, found = crowd
    made = [c for c in found.values() if "sigma" in c.details]
    shrunk = 0
    for k, c in zip(own.memory, made, strict=True):
        sigma, size = sigma_of(c.details), c.details["size"]
        assert (sigma == k.sigma.flatten().numpy()).all()
        assert size == k.size
        shown = float(Gaussian(1.0).radius(c.pa, c.pb))
        assert size <= shown
        shrunk += size < shown * 0.999
        region = c.details["region"]
        for name, value in {
            "axis_least": size * sigma.min(),
            "axis_largest": size * sigma.max(),
            "axis_mean": size * np.exp(np.log(sigma).mean()),
            "linf": size / np.sqrt((sigma**-2).sum()),
            "area": np.log(sigma).sum() + 2 * math.log(size),
            "log_volume": np.log(sigma).sum() + 2 * math.log(size) + math.log(math.pi),
        }.items():
            assert region[name] == pytest.approx(value, rel=1e-9)
            assert region[name] < value
        assert c.radius == pytest.approx(region["axis_least"], rel=1e-9)
        assert c.radius <= size * sigma.min()
    assert shrunk > 3
    recalled = [(i, c) for i, c in found.items() if c.details.get("recalled")]
    for index, c in recalled:
        place = dict(scattered())[index].double()
        best = max(k.left(place) for k in own.memory if k.holds(place))
        assert c.radius <= best  # memories grew since
        assert c.details["region"]["axis_least"] == pytest.approx(c.radius, rel=1e-9)


class Given(PerInputCertifier):
    """Takes the sigma of each image from a list."""

    sigmas: Sequence[float]

    def own_noise(self, smoothed, threat, x, stream):
        return Gaussian(torch.full(x.shape, self.sigmas[stream.image]).double())


def given(*sigmas: float) -> Given:
    own = Given(PLAN, CertifiedArea(n0=8), PIXELS)
    own.sigmas = sigmas
    return own


def test_two_inputs_whose_regions_would_overlap():
    """An island under little noise, the sea under much: alone each region holds the other's centre. With the memory
    they are apart in either order; another order answers otherwise, which the label says."""
    images = [(0, pixels(0.2, 0.2)), (1, pixels(0.2 + 0.09, 0.2))]
    images = [(i, L2.prepare(x[None])[0]) for i, x in images]
    alone = [given(0.035, 0.6) for _ in images]
    apart_ = [run(own, [image])[image[0]] for own, image in zip(alone, images, strict=True)]
    assert [c.prediction for c in apart_] == [1, 0]
    first, second = (own.memory[0] for own in alone)
    assert second.holds(first.x)
    assert meeting(first, second)[0] < 0.5
    for order in (images, images[::-1]):
        own = given(0.035, 0.6)
        found = run(own, order)
        assert {c.guarantee for c in found.values()} == {"order-dependent"}
        if order is images:
            assert [c.prediction for c in found.values()] == [1, 0]
            assert found[0].radius == apart_[0].radius
            assert 0 < found[1].radius < apart_[1].radius / 5
            assert meeting(*own.memory)[0] > 1
        else:
            assert [c.prediction for c in found.values()] == [0, 0]
            assert found[0].details["recalled"]
            assert found[0].evaluations == 0


def test_a_prediction_without_a_radius_is_remembered():
    """Files that are off the noise grid cost more than so little noise certifies: the prediction alone is left, and the
    input keeps it when a region of another prediction comes near."""
    own, x = given(1e-5, 0.6, 1.0), pixels(0.2, 0.2)
    images = [(0, x), (1, pixels(0.29, 0.2)), (2, x)]
    found = dict(own.certify(classifier(), FLOATS, images))
    assert [c.prediction for c in found.values()] == [1, 0, 1]
    assert (found[0].radius, found[2].radius) == (0, 0)
    assert found[2].details == {"recalled": True, "network": "plain float32"}
    assert "region" not in found[0].details
    assert 0 < found[1].radius < 0.09
    assert not own.memory[1].holds(x)
    json.dumps([asdict(c) for c in found.values()], allow_nan=False)


def test_abstentions_are_not_remembered():
    """No vote, and no region, comes of an input on a shore."""
    own = given(0.03)
    (answer,) = run(own, [(0, pixels(0.2 + 0.098, 0.2))]).values()
    assert (answer.prediction, answer.radius, answer.guarantee) == (-1, 0, "order-dependent")
    assert own.memory == []


# ---------------------------------------------------------------- the choice of sigma


def test_sigma_and_votes_use_different_draws(monkeypatch):
    """Sigma is chosen without any address of the votes' draws; the votes are those of the direct certificate under this
    sigma, fixed beforehand."""
    x, stream = scattered()[0][1], Stream(7, 5)
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "at", lambda *_: pytest.fail("a draw of the votes"))
        noise = certifier().own_noise(classifier(), L2, x, stream)
    ((_, found),) = certifier().certify(classifier(), L2, [(5, x)], seed=7)
    assert (sigma_of(found.details) == noise.sigma.flatten().numpy()).all()
    fixed = SmoothedClassifier(Net(), 3, noise=noise, block=50).eval()
    ((_, direct),) = AdditiveCertifier(PLAN).certify(fixed, L2, [(5, x)], seed=7)
    assert (direct.selection, direct.counts, direct.pa) == (found.selection, found.counts, found.pa)
    assert direct.radius == pytest.approx(found.radius, rel=1e-9)
    assert found.radius <= direct.radius
    assert found.evaluations == direct.evaluations + 8 * 11


def test_sigma_does_not_depend_on_the_global_generator():
    """Nor on what was certified before; it is another for another image or seed. The generator stays as it was."""
    x, noises = scattered()[0][1], []
    smoothed = classifier()
    for seed, address in [(0, (0, 0)), (1, (0, 0)), (1, (0, 1)), (1, (1, 0))]:
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        noises.append(certifier().own_noise(smoothed, L2, x, Stream(*address)).sigma)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[0], noises[2])
    assert not torch.equal(noises[0], noises[3])
    assert all(p.grad is None for p in smoothed.parameters())


def test_ascent_enlarges_the_region():
    """Where one pixel counts and the other does not: sigma of the second grows, and the certified area with it."""
    base = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        base[1].weight.copy_(torch.tensor([[20.0, 0], [-20, 0], [-40, 0]]))
    areas = []
    for steps in (1, 30):
        own = certifier(steps=steps, lr=0.1)
        (answer,) = run(own, [(0, pixels(0.8, 0.4))], base=base, sigma=0.3).values()
        areas.append(answer.details["region"]["area"])
    sigma = sigma_of(answer.details)
    assert sigma[1] == pytest.approx(0.3 * math.exp(3), rel=0.05)  # 30 steps of .1
    assert areas[1] > areas[0] + 1.5


def test_sigma_stays_where_sums_are_exact():
    """Of a pixel that the network does not look at, sigma would grow without end: beyond (2^24 / levels - 2) / 9 sums
    of image and noise round in float32, and the low bits of an attacked file would leak (theory.md section 11)."""
    base = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        base[1].weight.copy_(torch.tensor([[20.0, 0], [-20, 0], [-40, 0]]))
    noise = certifier(steps=20, lr=1.0).own_noise(classifier(base, 0.3), L2, pixels(0.8, 0.4), Stream(0, 0))
    limit = (2**24 / LEVELS - 2) / 9
    assert limit * 0.98 < noise.largest_sigma < limit
    SmoothedClassifier(base, 3, noise=noise)  # refuses what is not exact
    for lr in (1e3, 1e9):  # nor does it become 0 or infinite
        noise = certifier(steps=3, lr=lr).own_noise(classifier(base, 0.3), L2, pixels(0.8, 0.4), Stream(0, 0))
        assert noise.sigma.min() >= 0.999 / LEVELS
        assert noise.largest_sigma < limit


def test_works_in_inference_mode_and_for_batches():
    """As Lightning calls it; batches are one after the other, whatever is in flight."""
    images = scattered()[:12]
    with torch.inference_mode():
        calm = run(certifier(), [(i, x.clone()) for i, x in images])
    own = certifier()
    batched = {
        i: replace_seconds(c)
        for k in range(0, 12, 5)
        for i, c in own.certify(classifier(), L2, images[k : k + 5], in_flight=5)
    }
    assert calm == batched == run(certifier(), images)


# ---------------------------------------------------------------- order and resume


def test_order(crowd):
    """The same order gives the same certificates; another order others."""
    _, found = crowd
    assert run(certifier(), scattered()[:20]) == {i: found[i] for i in range(20)}
    backwards = run(certifier(), scattered()[::-1])
    assert sorted(backwards) == sorted(found)
    assert any(backwards[i].prediction != found[i].prediction for i in found)


def stored(folder, images: list[tuple[int, Tensor]], *parts: slice, in_flight: int = 4) -> list[bytes]:
    """Lines of a store, `seconds` left out, after runs over parts of the images, each resumed from the store."""
    for part in parts:
        store, own = Store(folder, {"of": "test"}), certifier()
        own.resume((record, dict(images)[record["index"]]) for record in read(folder))
        module = CertificationModule(own, classifier(), L2, store)
        todo = [image for image in images[part] if image[0] not in store.done]
        for k in range(0, len(todo), in_flight):
            indices, inputs = zip(*todo[k : k + in_flight], strict=True)
            module.predict_step((inputs, torch.zeros(len(inputs)), torch.tensor(indices)), 0)
    return [json.dumps(record | {"seconds": 0}).encode() for record in read(folder)]


def test_resume_gives_the_same_store(tmp_path):
    """Cut anywhere, with any number of images in flight, in an order that is not that of the indices: the memory that a
    store holds is that of the run, bit for bit."""
    images = scattered(3)
    images = images[:4] + images[18:] + images[4:8]
    whole = stored(tmp_path / "whole", images, slice(None))
    found = [json.loads(line) for line in whole]
    assert any(r["details"].get("recalled") for r in found)
    assert any(
        "size" in r["details"] and r["details"]["size"] < 0.99 * Gaussian(1.0).radius(r["pa"], r["pb"]) for r in found
    )
    for k, parts in enumerate([(7, 23), (3, 4, 29)]):
        cut = [slice(0, part) for part in parts] + [slice(None)]
        assert stored(tmp_path / str(k), images, *cut, in_flight=3) == whole


def test_resumed_memory_is_the_memory(crowd):
    """Sigma, sizes and centres survive a record, as JSON, without a change of a bit."""
    own, found = crowd
    lines = [json.loads(json.dumps(asdict(c) | {"index": i})) for i, c in found.items()]
    again = certifier()
    again.resume((line, dict(scattered())[line["index"]]) for line in lines)
    assert len(again.memory) == len(own.memory) > 20
    for one, two in zip(again.memory, own.memory, strict=True):
        assert (one.size, one.prediction) == (two.size, two.prediction)
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.sigma, two.sigma)
        assert one.sigma.dtype == torch.float64


def test_reports_of_such_a_store(crowd):
    """A recalled input counts with its class, though it has no votes; ellipsoids have their areas; the meaning of the
    guarantee is told."""
    _, found = crowd
    lines = [asdict(c) | {"index": i, "label": max(c.prediction, 0), "base": 0} for i, c in found.items()]
    recalled = [line for line in lines if line["details"].get("recalled")]
    assert recalled
    assert all(chosen(line) == line["prediction"] for line in recalled)
    rows = certificate_rows(lines, L2, "all of test", "made up")
    assert "order-dependent: holds for a classifier that remembers" in rows["guarantee"]
    right = sum(chosen(line) == line["label"] for line in lines)
    assert rows["smoothed accuracy (most votes)"].startswith(f"{right / len(lines):.3f}")
    sizes = [line["radius"] for line in by_area(lines)]
    for line, size in zip(lines, sizes, strict=True):
        if line["radius"]:
            assert size >= line["radius"] * (1 - 1e-9)


# ---------------------------------------------------------------- the command


LEARNED = (
    "experiment=digits_l2",
    "noise.sigma=0.25",
    "certify=per_input",
    "certify.steps=2",
    "maximise.n0=4",
    "sampling.n0=16",
    "sampling.n=64",
    *QUIET,
)


def test_command_resumes_to_the_same_bytes(network, here):
    """On digits: a run that was cut, and images that were asked for later, end as one that was not."""
    overrides = (*LEARNED, f"checkpoint={network(*LEARNED)}")
    run_task("certify", *overrides, "store=whole", "images.first=4", "images.in_flight=4")
    run_task("certify", *overrides, "store=part", "images.first=2", "images.in_flight=1")
    run_task("certify", *overrides, "store=part", "images.first=4", "images.in_flight=4")
    assert timeless(here / "whole")["records.jsonl"] == timeless(here / "part")["records.jsonl"]
    found = records(here / "whole")
    assert {r["guarantee"] for r in found} == {"order-dependent"}
    assert any("sigma" in r["details"] for r in found)
    run_task("certify", *overrides, "store=part", "images.first=4")  # nothing is left to do
    assert timeless(here / "whole")["records.jsonl"] == timeless(here / "part")["records.jsonl"]
    table = run_task("report", "stores=[part]")
    assert "order-dependent" in str(table)


def test_command_refuses_in_one_sentence(network, here):
    overrides = (*LEARNED, f"checkpoint={network(*LEARNED)}", "images.first=1")
    for option, words in {
        "scales=low_rank": "scales.rank=0",
        "maximise=range": "maximise=area",
    }.items():
        one_sentence(run_main("certify", *overrides, option), words)


# ---------------------------------------------------------------- refusals


def test_refuses_what_is_not_covered():
    brightness = TransformationThreat(Brightness(), -0.1, 0.1)

    def refused(words: str, smoothed: SmoothedClassifier, threat: Any = L2, plan: Any = PLAN) -> None:
        with pytest.raises((RequestError, UncertifiableError), match=words) as failure:
            list(certifier(plan).certify(smoothed, threat, [(0, pixels(0.2, 0.2))]))
        assert "\n" not in str(failure.value)
        assert len(str(failure.value)) < 250

    fine = classifier()
    refused("sampling=fixed", fine, plan=ConfidenceSequence())
    refused("sampling=fixed|radii", fine, plan=GroupSequential([0.1]))
    refused("votes=hard", classifier(votes="soft"), plan=SoftVotes())
    refused("hard|soft", classifier(votes="soft"))
    refused("noise=gaussian", SmoothedClassifier(Net(), 3))
    refused("noise=gaussian", SmoothedClassifier(Net(), 3, noise=Laplace(0.1), block=50).eval())
    own = Gaussian(covariance=[[0.01, 0.001], [0.001, 0.01]])
    refused("full covariance", SmoothedClassifier(Net(), 3, noise=own))
    low_rank = LowRankGaussian(torch.full((1, 1, 2), 0.1), torch.full((1, 1, 1, 2), 0.01))
    refused("independent Gaussian", SmoothedClassifier(Net(), 3, noise=low_rank, block=50).eval())
    for norm in ("l1", "linf"):
        refused("threat=l2", fine, PixelThreat(norm=norm))
    refused("smoothed over", fine, brightness)
    over = SmoothedClassifier(Net(), 3, Brightness(), None, Gaussian(0.1), Gaussian(0.1))
    refused("threat=l2", over, TransformationThreat(Brightness(), -0.1, 0.1, saved="real"))
    refused("random transformation", over)
    refused("preprocess=none", classifier(preprocess=Preprocess([GaussianLowPass(1.0)])))
    compiled = classifier()
    compiled.base = Compiled.__new__(Compiled)
    nn.Module.__init__(compiled.base)
    with pytest.raises(UncertifiableError, match="backend=fx"):
        certifier().check(compiled, L2)


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("steps", 1.5), ("steps", True), ("lr", 0), ("lr", "x"), ("lr", math.nan)]
)
def test_refuses_numbers_of_the_wrong_kind(option, value):
    with pytest.raises(RequestError, match=f"certify.{option}"):
        certifier(**{option: value})


def test_refuses_a_network_that_is_broken():
    """A NaN has no area."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 3) * math.nan + x.flatten(1).sum(1, keepdim=True)

    with pytest.raises(RequestError, match=r"^[^\n]*check the checkpoint$"):
        certifier().own_noise(classifier(Broken()), L2, pixels(0.2, 0.2), Stream(0, 0))
