"""Networks, the optimised copy, and checkpoints."""

import pytest
import torch
from torch import nn

from gsmooth_lightning.errors import RequestError
from gsmooth_lightning.model import SmallCNN, fused, load_weights, torchvision_model


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
    with pytest.raises(RequestError, match="compiled for blocks"):
        fast(x[:4])


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


@pytest.mark.parametrize("layout", ["plain", "state_dict", "lightning"])
def test_checkpoint_layouts_round_trip(tmp_path, layout):
    source, target = trained_looking(SmallCNN()), SmallCNN()
    state = source.state_dict()
    content = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "lightning": {"state_dict": {f"smoothed.base.{key}": value for key, value in state.items()}},
    }[layout]
    torch.save(content, tmp_path / "c.pt")
    load_weights(target, tmp_path / "c.pt")
    for key, value in target.state_dict().items():
        torch.testing.assert_close(value, state[key])


def test_a_mismatch_names_the_first_keys(tmp_path):
    torch.save(SmallCNN(widths=(8, 8)).state_dict(), tmp_path / "shapes.pt")
    with pytest.raises(RequestError, match=r"other shapes for features\.0\.weight"):
        load_weights(SmallCNN(), tmp_path / "shapes.pt")
    torch.save({"foo": torch.zeros(1)}, tmp_path / "keys.pt")
    with pytest.raises(RequestError, match=r"lacks features\.0\.weight.*unknown foo"):
        load_weights(SmallCNN(), tmp_path / "keys.pt")
