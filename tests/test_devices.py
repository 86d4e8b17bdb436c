"""Everything that computes, on a GPU (see `gpus`): results stay there, and nothing meets a tensor of the CPU.

A new option of a group is a case of its own by its file in conf/.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from conftest import ROOT, compose
from gpus import CUDA, Gpu, pretended
from gsmooth_lightning.data import Digits
from gsmooth_lightning.predict import Predictor
from gsmooth_lightning.rounds import run_rounds
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Exponential, Gaussian, LowRankGaussian, Product
from gsmooth_lightning.stream import Stream, TrainingSource
from gsmooth_lightning.tasks.setup import smoothed_classifier
from gsmooth_lightning.threat import Threat
from gsmooth_lightning.transform import Composition, Mover, Resolvable, compute, is_exact, load_surrogate

SMALLER = ("data.size=8", "data.enlarge=null")
TURNED = ("law.sigma=20", "threat.low=-5", "threat.high=5")
PIXELS = ("threat=l2", "transform=identity", "law=none", "preprocess=none", "error=none", "certify=direct")
LATENT = ("preprocess=latent", "noise=latent", "model=latent", "law=none", "certify=latent", "surrogate=FILE")
NARROW = ("threat.low=-0.1", "threat.high=0.1")
NESTED = ("certify.inner.n0=16", "certify.inner.n=32", "sampling.n0=2", "sampling.n=4")
TRACED = ("error.pieces=2", "error.splits=0", "error.refinements=1", "error.draws=8", "error.choose=4")
VISITED = ("certify=cover", "error=none", "law=none")
"""Overrides."""


def options(group: str) -> list[str]:
    """Those of a group that are something."""
    return sorted({path.stem for path in (ROOT / "conf" / group).glob("*.yaml")} - {"none"})


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended() as gpu:
        yield gpu


def made(cfg: DictConfig) -> tuple[SmoothedClassifier, Threat, torch.Tensor]:
    """The classifier, nearly always of class 3, the threat, and a prepared image: on the GPU."""
    torch.manual_seed(0)
    network = instantiate(cfg.model).eval()
    *_, last = (m for m in network.modules() if isinstance(m, nn.Linear))
    last.bias.data[3] += 2
    smoothed, threat = smoothed_classifier(cfg, network), instantiate(cfg.threat)
    image = Digits().split("test", 10)[0][0]
    return smoothed.to(CUDA), threat, threat.prepare(image[None].to(CUDA))[0]


def run(procedure):
    """What a procedure concludes on the GPU."""
    ((_, found, _),) = run_rounds([(0, procedure)], CUDA)
    return found


def check(*tensors: torch.Tensor) -> None:
    assert all(t.device == CUDA for t in tensors)
    assert all(torch.isfinite(t.cpu()).all() for t in tensors)


# ---------------------------------------------------------------- the rule itself


def test_devices_do_not_mix(gpu):
    """As torch has it: pointwise operations alone take a number from the CPU, and indexing takes indices."""
    x = torch.arange(4.0).to(CUDA)
    check(x + torch.tensor(1.0), x[torch.tensor([0, 2])], x * 2, torch.cat([x, x]), x.new_tensor([1.0]))
    for mixed in (
        lambda: x + torch.ones(4),
        lambda: torch.cat([x, torch.ones(4)]),
        lambda: torch.stack([x[0], torch.tensor(1.0)]),
        lambda: torch.ones(4)[x.long()],
        lambda: torch.ones(4) * x[0],
        lambda: x.view(2, 2) @ torch.eye(2),
    ):
        with pytest.raises(RuntimeError, match="on the CPU meets"):
            mixed()


def test_waits_are_seen(gpu):
    """Numbers that the host asks for or sends, and shapes that depend on them."""
    x = torch.arange(4.0, device=CUDA)
    (x * 2).sum(), torch.zeros(3, device=CUDA), x[1:], x.double()
    assert not gpu.waits
    for wait in (
        lambda: bool(x[0]),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x[x > 1],
        lambda: torch.ones(3).to(CUDA),
        lambda: torch.tensor([1.0], device=CUDA),
    ):
        gpu.waits.clear()
        wait()
        assert gpu.waits


# ---------------------------------------------------------------- parts


def own(option: str) -> tuple[str, ...]:
    """What an option asks of the configuration around it: overrides."""
    asked = {
        "mfcc_resnet": ("data=speech_commands",),
        "torchvision": ("model.name=resnet18",),
        "timm": ("model.name=resnet10t",),
        "custom": ("model._target_=gsmooth_lightning.model.SmallCNN",),
        "black_box": ("model.function.path=test_devices.zeros",),
        "by_part": ("noise.sigma=[0.5,0.4]",),
    }
    return asked.get(option, ())


@pytest.mark.parametrize("option", options("transform"))
def test_transformations(gpu, option):
    threat = () if option == "identity" else (f"threat={option}",)
    cfg = compose("certify", f"transform={option}", *threat)
    transform = instantiate(cfg.transform).to(CUDA)
    x = torch.rand(4, 1, 12, 12).to(CUDA)
    ends = [torch.full((4, transform.dim), 0.0), torch.full((4, transform.dim), 0.4)]
    if threat:
        attack = instantiate(cfg.threat)
        ends = [torch.tensor(end).expand(4, -1) * 0.3 for end in (attack.lows, attack.highs)]
        check(attack.apply(x, ends[1].to(CUDA)))
    low, high = (end.double().to(CUDA) for end in ends)
    check(compute(transform, x, low), compute(transform, x, high))
    if isinstance(transform, Mover) and option != "similarity":  # of which no departure is known
        check(transform.departure(x[0], low, high))
    if is_exact(transform) and transform.dim:
        check(*transform.values(x[0], low[0].cpu(), high[0].cpu()))


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in ("law", "noise") for o in options(g)])
def test_laws(gpu, group, option, surrogate_file):
    cfg = compose("certify", f"{group}={option}", *own(option), f"surrogate={surrogate_file}")
    law = instantiate(cfg[group]).to(CUDA)
    shapes = {"latent": getattr(law, "directions", torch.zeros(1, 1))[0].shape, "product": (2,)}
    shape = (1, 28, 28) if group == "noise" else (1,)
    shape = tuple(shapes.get(option, shape))
    addressed = law.sample(Stream(0, 0).at("estimate", 0, CUDA), 4, shape)
    check(addressed, law.sample(TrainingSource(CUDA), 4, shape))
    if option != "product":
        law.gauge(addressed.float())
    law.within(1e-4, math.prod(shape))
    assert law.span[0] < law.span[1]
    assert law.slack(1, 255) > 0


def test_low_rank_noise_made_on_the_gpu(gpu):
    """As `train.Scales` makes it in a training there."""
    law = LowRankGaussian(torch.rand(1, 4, 4).add(0.1).to(CUDA), torch.randn(2, 1, 4, 4).to(CUDA))
    z = law.sample(TrainingSource(CUDA), 3, (1, 4, 4))
    check(z, law.gauge(z), law.log_density(z), law.half_log_det((1, 4, 4)))


@pytest.mark.parametrize("option", options("preprocess"))
def test_preprocessing(gpu, option, surrogate_file):
    preprocess = instantiate(compose("certify", f"preprocess={option}", f"surrogate={surrogate_file}").preprocess)
    size = 256 if "resize" in option else 28
    check(preprocess.to(CUDA)(torch.rand(2, 1, size, size).to(CUDA)))


@pytest.mark.parametrize("option", options("model"))
def test_networks(gpu, option, surrogate_file):
    """A black box answers on the CPU."""
    cfg = compose("certify", f"model={option}", *own(option), f"surrogate={surrogate_file}")
    shape = (cfg.data.channels, cfg.data.size) if option == "mfcc_resnet" else (1, 28, 28)
    shape = {"latent": (8, 14, 14), "spectrum_cnn": (1, 11, 11)}.get(option, shape)
    network = instantiate(cfg.model).eval().to(CUDA)
    check(network(torch.rand(2, *shape).to(CUDA)))


def zeros(x: torch.Tensor) -> torch.Tensor:
    """A black box."""
    assert x.device.type == "cpu"
    return torch.zeros(len(x), dtype=torch.int64)


@pytest.mark.parametrize("option", options("denoiser"))
@pytest.mark.parametrize("denoising", options("denoising"))
def test_denoisers(gpu, option, denoising):
    cfg = compose("denoise", f"denoiser={option}", f"denoising={denoising}")
    denoiser, classifier = instantiate(cfg.denoiser).to(CUDA), instantiate(cfg.model).to(CUDA)
    x = torch.rand(2, 1, 28, 28).to(CUDA)
    instantiate(cfg.denoising)(denoiser, classifier, x, denoiser(x)).backward()
    check(*(p.grad for p in denoiser.parameters()))


# ---------------------------------------------------------------- the whole


CERTIFIERS = {
    "direct": PIXELS,
    "direct, l1": (*PIXELS, "threat=l1", "noise=laplace"),
    "direct, parameters": ("certify=direct", "error=none", "transform=gamma", "threat=gamma", "law.sigma=0.5", *NARROW),
    "joint": TURNED,
    "joint, intervals": (*TURNED, "error.search=intervals", *TRACED[3:], *NARROW),
    "joint, grid": (*TURNED, "error.search=grid", "error.draws=16", "transform.interpolation=bicubic"),
    "nested": (
        *TURNED,
        "certify=nested",
        "error=image_hard",
        "certify.inner.n0=16",
        "certify.inner.n=32",
        "sampling.n=8",
    ),
    "nested_published": (*TURNED, "certify=nested_published", "error=base", "sampling.n=8"),
    "received": (
        *TURNED,
        "certify=received",
        "certify.attacked=true",
        "error=inverse",
        "error.pieces=4",
        "error.splits=1",
    ),
    "cover": (*VISITED, "threat.low=0", "threat.high=1"),
    "cover, pixelation": (*VISITED, "transform=pixelate", "threat=pixelate"),
    "cover, a function": (
        "certify=cover",
        "error=none",
        "law=none",
        "transform=function",
        "threat=function",
        "threat.high=3",
    ),
    "enumerate": (
        "certify=enumerate",
        "error=none",
        "transform=cyclic_translation",
        "threat=cyclic_translation",
        "law=uniform",
        "noise=none",
        "preprocess=none",
    ),
    "latent": (*LATENT, "error=latent", "threat.low=-0.5", "threat.high=0.5", "error.tolerance=1"),
    "latent, of the surrogate": (*LATENT, "error=latent_surrogate", "error.tolerance=3"),
    "latent, corollary": (*LATENT, "error=corollary", "error.points=3"),
    "latent, corollary_proved": (*LATENT, "error=corollary_proved"),
    "per_input": (*PIXELS, "certify=per_input", "certify.steps=2", "maximise.n0=4"),
}
"""Overrides of a run with each theorem, and with each error bound of one image."""

CALIBRATED = {
    "distribution": (*TURNED, "error=distribution", "error.calibration=4", "error.draws=64", "error.rho=0.2"),
    "pooled": (*TURNED, "error=pooled", "error.calibration=4", "error.draws=16"),
}
"""Those with a bound of calibration images."""


def test_every_theorem_and_every_bound_has_a_run():
    words = " ".join(f"{name} {' '.join(of)}" for name, of in (CERTIFIERS | CALIBRATED).items())
    assert all(option in words for option in (*options("certify"), *options("error"))), words


def certifiable(name, surrogate_file):
    given = [o.replace("FILE", str(surrogate_file)) for o in (CERTIFIERS | CALIBRATED)[name]]
    size = () if "latent" in name else SMALLER
    pixels = () if any(o.startswith("noise=") for o in given) else ("noise.sigma=0.5",)
    draws = ("sampling.n0=16", "sampling.n=48", "sampling.alpha=0.1", "block=16")
    return compose("certify", *draws, *size, *pixels, *given)


@pytest.mark.parametrize("name", CERTIFIERS)
def test_certificates(gpu, name, surrogate_file):
    """One image, from the checks before it to the record."""
    cfg = certifiable(name, surrogate_file)
    (smoothed, threat, x), certifier = made(cfg), instantiate(cfg.certify)
    ((_, found),) = certifier.certify(smoothed, threat, [(0, x)])
    assert found.n > 0
    json.dumps(asdict(found))
    if name in ("direct", "nested", "cover", "per_input"):  # of the others it is the same error bound again
        run(certifier.limits(smoothed, threat, x, Stream(0, 0)))


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_bounds(gpu, name, surrogate_file):
    cfg = certifiable(name, surrogate_file)
    smoothed, threat, x = made(cfg)
    error = instantiate(cfg.error)
    error.check(smoothed, threat)
    norms = {i: run(error.measure(smoothed, threat, x, Stream(0, i))).tolist() for i in range(4)}
    assert error.fit(norms, smoothed, threat) == run(error.procedure(smoothed, threat, x, Stream(0, 9)))


def test_predictions(gpu, surrogate_file):
    """And draws shared by no stage: soft votes and hard ones, the base classifier, the check before."""
    for votes in ("hard", "soft"):
        smoothed, _, x = made(compose("certify", *SMALLER, *TURNED, f"votes={votes}", "block=16"))
        smoothed.check_function(x)
        check(smoothed.classify_base(x.expand(3, *x.shape)))
        predictor = Predictor(smoothed, 64, 0.1)
        assert run(predictor.procedure(x, predictor.stream(x, 0))).n > 0


ATTACKS = {
    "eot": (*TURNED, "attack.restarts=4", "attack.steps=2", "attack.draws=2"),
    "grid": (*TURNED, "attack.points=3"),
    "worst_of_k": (*TURNED, "attack.k=4"),
    "pgd": (*PIXELS, "attack.epsilons=[0.5]", "attack.draws=2", "attack.craft.attack.steps=2"),
    "torchattacks": (*PIXELS, "attack.epsilons=[0.5]", "attack.draws=2", "+attack.craft.make.steps=2"),
}


@pytest.mark.parametrize("option", sorted(set(options("attack")) - {"foolbox"}))
def test_attacks(gpu, option):
    """But foolbox's: it asks a tensor for its very class."""
    if option == "torchattacks":
        pytest.importorskip(option)
    cfg = compose("attack", *SMALLER, "block=16", "attack.n=16", f"attack={option}", *ATTACKS[option])
    smoothed, threat, x = made(cfg)
    found = run(instantiate(cfg.attack)(smoothed, threat, x, 3, Stream(0, 0)))
    assert len(found.base) == len(found.votes) > 1


@pytest.mark.parametrize("option", options("objective"))
def test_objectives(gpu, option):
    """A step of the optimiser."""
    smoothed, threat, x = made(cfg := compose("train", *SMALLER, *TURNED, f"objective={option}"))
    smoothed.base.train()
    images, y = x.expand(4, *x.shape), torch.tensor([0, 1, 2, 3]).to(CUDA)
    loss, logits = instantiate(cfg.objective)(smoothed, threat.prepare(images), y, 100)
    loss.backward()
    check(loss, logits, *(p.grad for p in smoothed.base.parameters()))
    torch.optim.Adam(smoothed.base.parameters()).step()


LEARNED = [(o, s) for o in options("maximise") for s in options("scales") if (o, s) != ("range", "low_rank")]
"""But what `CertifiedRange` refuses."""


@pytest.mark.parametrize(("option", "scales"), LEARNED)
def test_learned_noise(gpu, option, scales):
    """As `SigmaModule` does it; the scales are made where their noise is."""
    around = PIXELS if option == "area" else TURNED
    cfg = compose("sigma", *SMALLER, *around, f"maximise={option}", f"scales={scales}", "maximise.n0=4")
    smoothed, threat, x = made(cfg)
    scales = instantiate(cfg.scales)(Gaussian(torch.full(x.shape, 0.5)).to(CUDA), tuple(x.shape)).to(CUDA)
    images, y = x.expand(4, *x.shape), torch.full((4,), 3).to(CUDA)
    loss, measures = instantiate(cfg.maximise)(smoothed.under(scales.law()), threat, images, y)
    loss.backward()
    check(loss, *measures.values(), scales.log_sigma.grad)


def test_imitation(gpu, surrogate_file):
    cfg = compose("surrogate", "imitation.penalty=1", f"surrogate={surrogate_file}")
    surrogate = load_surrogate(surrogate_file).requires_grad_(True).to(CUDA)
    x, xi = torch.rand(2, 1, 28, 28).to(CUDA), torch.ones(2, 1).to(CUDA)
    instantiate(cfg.imitation)(surrogate, x, x, xi).backward()
    check(*(p.grad for p in surrogate.parameters()))


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("option", [o for o in options("transform") if o != "identity"])
def test_a_block_of_draws_runs_without_the_host(gpu, option):
    """Between two rounds nothing is asked of the device, and nothing sent to it: it has a queue of blocks to work on.
    (What is drawn is resolvable; the others are visited by certify=cover.)"""
    cfg = compose("certify", f"transform={option}", f"threat={option}", "model.widths=[4]", "model.hidden=8", "block=4")
    transform = instantiate(cfg.transform)
    parts = transform.parts if isinstance(transform, Composition) else (transform,)
    if not all(isinstance(part, Resolvable) for part in parts):
        return
    law = Exponential(5.0) if transform.lowest == 0 else Gaussian(torch.full((transform.dim,), 0.1))
    laws = Product([Exponential(5.0), Gaussian(0.1)]) if option == "blur_brightness" else law
    network = instantiate(cfg.model).eval()
    smoothed = SmoothedClassifier(network, 10, transform, instantiate(cfg.preprocess), laws, Gaussian(0.5), 4).to(CUDA)
    x = torch.rand(1, 28, 28).to(CUDA)
    draws = partial(smoothed.draw, x, n=4)
    smoothed.block_counts(lambda b: draws(source=Stream(0, 0).at("estimate", b, CUDA)), 0, 0, 4)  # fills caches
    gpu.waits.clear()
    smoothed.block_counts(lambda b: draws(source=Stream(0, 0).at("estimate", b, CUDA)), 1, 0, 4)
    assert not gpu.waits


@pytest.mark.parametrize("option", options("noise"))
def test_noise_is_drawn_without_the_host(gpu, option, surrogate_file):
    law = instantiate(compose("certify", f"noise={option}", *own(option), f"surrogate={surrogate_file}").noise).to(CUDA)
    shape = tuple(law.directions.shape[1:]) if option == "latent" else (1, 28, 28)
    gpu.waits.clear()
    law.sample(Stream(0, 0).at("estimate", 0, CUDA), 4, shape)
    assert bool(gpu.waits) == (option == "mixed_linf"), gpu.waits  # which finds its caps by rejection, in NumPy
