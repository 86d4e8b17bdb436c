"""Networks, and the optimised copy."""

import pytest
import torch
from hydra.utils import instantiate
from scipy.stats import norm
from torch import nn

from conftest import compose
from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model import (
    CifarResNet,
    MFCCNet,
    Normalize,
    SmallCNN,
    WienerBank,
    cifar_resnet,
    fused,
    small_resnet18,
    timm_model,
    torchvision_model,
)
from gsmooth_lightning.model.pretrained import normalized
from gsmooth_lightning.smoothed import SmoothedClassifier
from gsmooth_lightning.smoothing import Gaussian
from gsmooth_lightning.stream import Stream
from gsmooth_lightning.transform import GaussianBlur


def trained_looking(network: nn.Module) -> nn.Module:
    """Batch-norm statistics and weights that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("backend", ["fx", "compile"])
def test_optimised_network_agrees_and_votes_differ_only_below_the_margin(backend):
    torch.manual_seed(0)
    network = trained_looking(SmallCNN())
    noisy = torch.rand(64, 1, 28, 28) + torch.randn(64, 1, 28, 28) / 2
    fast, used = fused(network, noisy, backend)
    assert used == backend
    with torch.inference_mode():
        plain, other = network(noisy), fast(noisy.clone())
    assert (plain - other).abs().max() <= 1e-4 * max(1, plain.abs().max())
    best = plain.topk(2).values
    decided = best[:, 0] - best[:, 1] > 2e-4 * max(1, plain.abs().max())
    assert (plain.argmax(1) == other.argmax(1))[decided].all()
    assert decided.float().mean() > 0.9


def test_compiled_network_survives_threads_modes_and_foreign_inputs():
    """Every way of calling it ends in the one compiled form; another shape is refused, not compiled again."""
    network = trained_looking(SmallCNN(widths=(4,), hidden=8))
    x = torch.rand(8, 1, 28, 28)
    fast, _ = fused(network, x, "compile")
    threads = torch.get_num_threads()
    with torch.inference_mode():
        inside = fast(torch.rand(8, 1, 28, 28).copy_(x))
    torch.set_num_threads(2)
    with torch.no_grad():
        outside = fast(x.expand(8, 1, 28, 28))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    torch.testing.assert_close(inside, outside, atol=0, rtol=0)
    with pytest.raises(RequestError, match=r"compiled for blocks .*; use backend=fx"):
        fast(x[:4])


def test_the_backend_does_not_depend_on_what_the_process_compiled_before():
    """torch's limit (8 compilations of one forward) is no limit on the jobs of a sweep or the rows of a comparison."""
    x = torch.rand(2, 1, 8, 8)
    with torch._dynamo.config.patch(recompile_limit=1):
        used = [fused(SmallCNN(size=8, widths=(2,), hidden=4), x)[1] for _ in range(2)]
    assert used == ["compile", "compile"]


def test_auto_falls_back_and_says_so():
    """A network that no compiler can trace is still usable."""

    class Untraceable(nn.Module):
        def forward(self, x):
            if torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy):
                raise RuntimeError("not for compilers")
            return x.flatten(1)[:, :10]

    with pytest.warns(UserWarning, match="not available here"):
        fast, used = fused(Untraceable(), torch.rand(4, 1, 28, 28))
    assert used == "plain"
    assert fast(torch.rand(4, 1, 28, 28)).shape == (4, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_networks_by_name(channels):
    statistics = ([0.5] * channels, [0.25] * channels)
    network = torchvision_model("mobilenet_v3_small", channels, 7, *statistics).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, channels, 32, 32)).shape == (2, 7)
    with pytest.raises(RequestError, match="no classifier"):
        torchvision_model("nosuchnet", 3, 10, *statistics)
    with pytest.raises(RequestError, match="channels"):
        torchvision_model("resnet18", 2, 10, *statistics)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("model", "data", "options"),
    [
        ("small_cnn", "digits", []),
        ("small_cnn", "mnist", []),
        ("small_cnn", "fashion_mnist", []),
        ("small_cnn", "gtsrb", []),
        ("cifar_resnet", "cifar10", []),
        ("cifar_resnet", "cifar10_c", ["model.depth=110"]),
        ("cifar_resnet", "cifar100", []),
        ("cifar_resnet", "gtsrb", []),
        ("resnet18", "cifar100", []),
        ("resnet18", "fashion_mnist", []),
        ("torchvision", "imagenet", []),
        ("torchvision", "mnist", ["model.name=resnet18"]),
        ("torchvision", "kitti", ["model.name=mobilenet_v3_small"]),
        ("timm", "restricted_imagenet", ["model.name=resnet10t"]),
        ("timm", "folder", ["model.name=resnet10t", "data.classes=3", "data.size=64"]),
        ("timm", "mnist", ["model.name=resnet10t"]),
        ("mfcc_resnet", "speech_commands", []),
        ("mfcc_resnet", "speech_commands_ten", []),
        ("custom", "digits", ["model._target_=gsmooth_lightning.model.SmallCNN", "+model.widths=[4]"]),
    ],
)
def test_every_configured_network_takes_its_data(model, data, options):
    """(n, channels, size, size) images or (n, 1, size) waveforms -> (n, classes) finite logits, that differ."""
    cfg = compose("train", f"model={model}", f"data={data}", *options)
    network = instantiate(cfg.model).eval()
    size = cfg.data.size
    shape = [size] if cfg.data.saved == "16bit" else [size, size] if isinstance(size, int) else list(size)
    with torch.inference_mode():
        logits = network(torch.rand(2, cfg.data.channels, *shape))
    assert logits.shape == (2, cfg.data.classes)
    assert torch.isfinite(logits).all()
    assert logits.std() > 0


def test_the_normalisation_of_the_data_reaches_the_network():
    """data.mean and data.std by default, SmoothAdv's by hand."""
    cfg = compose("train", "model=cifar_resnet", "data=cifar10")
    layer = instantiate(cfg.model)[0]
    assert layer.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert layer.std.flatten().tolist() == pytest.approx([0.2023, 0.1994, 0.2010])
    cfg = compose("train", "model=cifar_resnet", "data=cifar10", "model.std=[1,1,1]")
    assert instantiate(cfg.model)[0].std.flatten().tolist() == [1, 1, 1]


def by_hand(depth: int, channels: int, classes: int) -> int:
    """Weights of He et al.'s network with 1x1 shortcuts: convolutions without bias, each with two numbers a channel."""
    k = (depth - 2) // 6
    total = channels * 16 * 9 + 2 * 16
    for inputs, outputs in [(16, 16), (16, 32), (32, 64)]:
        total += inputs * outputs * 9 + (2 * k - 1) * outputs * outputs * 9 + 2 * k * 2 * outputs
        total += inputs * outputs + 2 * outputs if inputs != outputs else 0
    return total + 64 * classes + classes


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_residual_networks_have_the_published_size(depth, millions):
    """He et al. 2016, Table 6, whose shortcuts have no weights; ours have 2752."""
    count = parameters(CifarResNet(depth))
    assert count == by_hand(depth, 3, 10)
    assert (count - 2752) / 1e6 == pytest.approx(millions, abs=0.05 if millions == 1.7 else 0.005)
    assert parameters(CifarResNet(depth, 1, 43)) == by_hand(depth, 1, 43)


@pytest.mark.parametrize("depth", [18, 21, 22, 51, 2, 0, -4])
def test_other_depths_are_refused(depth):
    with pytest.raises(RequestError, match=r"model\.depth must be 6 k"):
        CifarResNet(depth)


def test_residual_networks_halve_the_image_twice():
    sizes = {}
    network = CifarResNet(20)
    for name in ("layer1", "layer2", "layer3"):
        getattr(network, name).register_forward_hook(
            lambda m, i, o, name=name: sizes.update({name: tuple(o.shape[1:])})
        )
    network(torch.rand(2, 3, 32, 32))
    assert sizes == {"layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)}


@pytest.mark.parametrize("channels", [1, 3])
def test_small_resnet18_keeps_the_resolution_in_its_first_stage(channels):
    network = small_resnet18(channels, 7, [0.5] * channels, [0.25] * channels).eval()
    sizes = {}
    for name in ("layer1", "layer4"):
        getattr(network[1], name).register_forward_hook(
            lambda m, i, o, name=name: sizes.update({name: tuple(o.shape[1:])})
        )
    with torch.inference_mode():
        assert network(torch.rand(2, channels, 32, 32)).shape == (2, 7)
    assert sizes == {"layer1": (64, 32, 32), "layer4": (512, 4, 4)}


@pytest.mark.parametrize("channels", [1, 3])
def test_timm_networks_by_name(channels):
    statistics = ([0.5] * channels, [0.25] * channels)
    network = timm_model("resnet10t", channels, 7, *statistics).eval()
    with torch.inference_mode():
        assert network(torch.rand(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["nosuchnet", "", "resnet18.nosuchtag", "hub:x", "resnet 18"])
def test_unknown_networks_are_refused_in_one_sentence(name):
    for build in (timm_model, torchvision_model):
        with pytest.raises(RequestError, match=r"timm has no model|torchvision has no classifier") as caught:
            build(name, 3, 10, [0.5] * 3, [0.5] * 3)
        assert "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="must be a ResNet of torchvision"):
        MFCCNet(name)


def test_other_networks_of_torchvision_are_refused_for_waveforms():
    """Their first layer is not called conv1, or they are no classifiers."""
    for name in ("vgg11", "resnext50_32x4d", "fcn_resnet50", "resnet"):
        with pytest.raises(RequestError, match="must be a ResNet"):
            MFCCNet(name)


# -------------------------------------------------- normalisation


def test_normalisation_by_hand():
    layer = Normalize([0.5, 0.25], [0.5, 2.0])
    x = torch.tensor([[[[1.0, 0.0]], [[0.25, 4.25]]]])
    assert torch.equal(layer(x), torch.tensor([[[[1.0, -1.0]], [[0.0, 2.0]]]]))
    assert layer.state_dict() == {}


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.0], [0.0]),
        ([0.0], [-1.0]),
        ([0.0] * 3, [1.0, 0.0, 1.0]),
        ([0.0], [float("nan")]),
        ([0.0] * 3, [1.0]),
        ([], [1]),
    ],
)
def test_normalisations_that_make_no_sense_are_refused(mean, std):
    with pytest.raises(RequestError, match="one value a channel"):
        Normalize(mean, std)


def test_whole_numbers_are_statistics_like_others():
    assert Normalize([0, 0, 0], [1, 1, 1]).std.dtype == torch.float32


def linear(weight: torch.Tensor, bias: float) -> nn.Module:
    """Logits (0, <weight, x> + bias)."""
    layer = nn.Linear(weight.numel(), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([torch.zeros(weight.numel()), weight.flatten()]))
        layer.bias.copy_(torch.tensor([0.0, bias]))
    return nn.Sequential(nn.Flatten(), layer)


def test_noise_and_radii_are_in_units_of_the_input():
    """Of a linear network behind (x - m) / s the gradient is w / s, and P(class 1) = Phi(score / (sigma ||w / s||))."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 2, 2, generator=generator)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.5, 2.0])[:, None, None]
    network = normalized(linear(weight, 0.7), mean.flatten().tolist(), std.flatten().tolist()).eval()
    x = torch.rand(1, 3, 2, 2, generator=generator, requires_grad=True)
    score = network(x)[0, 1]
    score.backward()
    torch.testing.assert_close(x.grad[0], weight / std)
    smoothed = SmoothedClassifier(network, 2, noise=Gaussian(0.25))
    draws = smoothed.draw(x.detach()[0], Stream(0, 0).at("estimate", 0), 20_000)
    share = float((smoothed.labels(draws) == 1).float().mean())
    expected = norm.cdf(score.item() / (0.25 * (weight / std).norm().item()))
    assert 0.05 < expected < 0.95
    assert share == pytest.approx(expected, abs=0.015)  # four standard deviations


# -------------------------------------------------- waveforms


def clip(n: int, t: int = 3200, seed: int = 0) -> torch.Tensor:
    """Tones with some noise, within [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pitch = torch.rand(n, 1, 1, generator=generator) * 0.3 + 0.02
    tone = torch.sin(pitch * torch.arange(t)) * 0.5
    return tone + torch.randn(n, 1, t, generator=generator) * 0.05


@pytest.fixture(scope="module")
def audio() -> nn.Module:
    torch.manual_seed(0)
    return trained_looking(MFCCNet(classes=5))


def test_the_gradient_reaches_the_waveform(audio):
    """It agrees with a central difference in float64."""
    network = MFCCNet(classes=5)
    network.load_state_dict(audio.state_dict())
    network = network.double().eval()
    x = clip(2).double().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x)[:, 0].sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1) != 0).float().mean() > 0.99
    x, gradient = x.detach(), gradient.detach()
    way, h = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1e-6
    for direction in (way, gradient / gradient.norm()):
        with torch.inference_mode():
            difference = float((network(x + h * direction)[:, 0] - network(x - h * direction)[:, 0]).sum()) / (2 * h)
        assert difference == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


def test_silence_has_a_finite_gradient(audio):
    """Log energies at zero energy."""
    x = torch.zeros(1, 1, 3200, requires_grad=True)
    (gradient,) = torch.autograd.grad(audio(x)[:, 0].sum(), x)
    assert torch.isfinite(gradient).all()


def test_a_loud_clip_does_not_change_its_neighbours(audio):
    """A row's logits depend on its own waveform only: no floor relative to the loudest clip of a batch."""
    quiet, loud = clip(1) * 1e-3, clip(1, seed=1) * 1.5
    with torch.inference_mode():
        alone = audio(torch.cat([quiet, quiet]))[0]
        beside = audio(torch.cat([quiet, loud]))
    torch.testing.assert_close(beside[0], alone, atol=1e-5, rtol=1e-5)
    assert (beside[1] - beside[0]).abs().max() > 0.1
    SmoothedClassifier(audio, 5, noise=Gaussian(0.05), block=4).check_function(loud[0].clamp(-1, 1))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: MFCCNet(classes=5), (1, 3200)),
        (lambda: cifar_resnet(20, 3, 10, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), (3, 32, 32)),
        (lambda: small_resnet18(1, 10, [0.5], [0.25]), (1, 28, 28)),
        (lambda: torchvision_model("resnet18", 1, 10, [0.5], [0.25]), (1, 64, 64)),
    ],
    ids=["mfcc_resnet", "cifar_resnet", "resnet18", "torchvision"],
)
def test_optimised_residual_networks_agree(build, shape):
    """On inputs that were not the example."""
    torch.manual_seed(3)
    network = trained_looking(build())
    fast, used = fused(network, torch.rand(4, *shape), "fx")
    assert used == "fx"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    other = torch.rand(4, *shape) * 2 - 1
    with torch.inference_mode():
        plain, found = network(other), fast(other)
    torch.testing.assert_close(found, plain, atol=1e-4 * max(1, float(plain.abs().max())), rtol=0)


@pytest.mark.filterwarnings("ignore:.*default weight init:FutureWarning")
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvision_networks_return_logits_in_training_mode(name, monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *args, **options: tensor)  # it takes half a minute
    network = torchvision_model(name, 3, 5, [0.5] * 3, [0.5] * 3).train()
    assert network(torch.rand(2, 3, 96, 96)).shape == (2, 5)


def test_a_wiener_bank_takes_blur_back():
    """An image of low modes, blurred in the DCT semigroup: each channel shows it unblurred where the filter is that of
    its variance, and the first channel as it came."""
    i, j = torch.arange(20.0)[:, None], torch.arange(14.0)
    x = 0.5 + sum(
        a * torch.cos(torch.pi / 20 * k * (i + 0.5)) * torch.cos(torch.pi / 14 * m * (j + 0.5))
        for a, k, m in ((0.2, 1, 0), (0.1, 2, 1), (-0.1, 0, 2))
    )
    images = torch.stack([x, x.flip(0)])[None].float()  # two channels
    bank = WienerBank([20, 14], 2, variances=(4.0, 9.0), gain=1000).eval()
    for k, variance in enumerate((0.0, 4.0, 9.0)):
        seen = bank(GaussianBlur()(images, torch.tensor([[variance]])))
        assert seen.shape == (1, 6, 20, 14)
        plain = nn.InstanceNorm2d(2)(images)
        torch.testing.assert_close(seen[:, k::3], plain, atol=2e-3, rtol=0)
    torch.testing.assert_close(seen.mean((2, 3)), torch.zeros(1, 6), atol=1e-5, rtol=0)


def test_a_wiener_bank_drops_what_blur_left_to_the_noise():
    """Noise is amplified by gain / 2 at most."""
    bank = WienerBank(16, 1, variances=(30.0,), gain=50)
    assert 15 < bank.filters.max() <= 25
    assert bank.filters[0].max() <= 1
    assert bank.filters[1, -1, -1] < 1e-6


def test_a_standardizing_network_does_not_see_brightness_and_contrast():
    network = SmallCNN(standardize=True).eval()
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(network(0.3 * (x + 2)), network(x), atol=1e-3, rtol=0)


def test_float32_is_all_of_float32():
    """Else convolutions on a GPU put a network 1e-3 from its optimised copy; and a user, or a container that sets
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, rounds matrix products of which error bounds take all 24 bits."""
    network, x = SmallCNN(widths=(4,), hidden=8).eval(), torch.rand(4, 1, 28, 28)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    smoothed = SmoothedClassifier(network, 10, noise=Gaussian(0.5), block=4)
    with pytest.raises(RequestError, match='set_float32_matmul_precision\\("highest"\\)'):
        smoothed.check_function(x[0])
    fused(network, x, "plain")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    smoothed.check_function(x[0])


@pytest.mark.parametrize("setting", [torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv])
def test_float32_is_all_of_float32_under_the_newer_settings(setting):
    """torch.backends.fp32_precision sets what `allow_tf32 = False` leaves open; after either, torch's older getters
    refuse to answer."""
    network, x = SmallCNN(widths=(4,), hidden=8).eval(), torch.rand(4, 1, 28, 28)
    for part in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul):
        part.fp32_precision = "none"  # as in a new process
    setting.fp32_precision = "tf32"
    smoothed = SmoothedClassifier(network, 10, noise=Gaussian(0.5), block=4)
    if setting is not torch.backends.cudnn.conv:
        with pytest.raises(RequestError, match='set_float32_matmul_precision\\("highest"\\)'):
            smoothed.check_function(x[0])
    fused(network, x, "plain")
    assert "tf32" not in (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
    smoothed.check_function(x[0])
