"""The DCGAN generator against its layers written out in torch.nn.functional."""

import pytest
import torch
import torch.nn.functional as F

from vqcore.networks.dcgan import DCGANGenerator


def trained(latent: int = 7, widths: tuple[int, ...] = (6, 5, 4), colours: int = 3) -> DCGANGenerator:
    """A network whose every number is drawn, batch norm's too."""
    network = DCGANGenerator(latent, widths, colours).eval()
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "var" in name else -0.5))
    return network


def written_out(state: dict[str, torch.Tensor], z: torch.Tensor, layers: int) -> list[torch.Tensor]:
    """Every layer's output, from names in the state dict and formulas alone."""
    x, maps = z.view(*z.shape, 1, 1), []
    for layer in range(layers):
        stride, padding = (1, 0) if layer == 0 else (2, 1)
        x = F.conv_transpose2d(x, state[f"main.{3 * layer}.weight"], stride=stride, padding=padding)
        if layer < layers - 1:
            norm = {name: state[f"main.{3 * layer + 1}.{name}"] for name in ("weight", "bias")}
            mean, var = (state[f"main.{3 * layer + 1}.running_{name}"] for name in ("mean", "var"))
            x = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
            x = (x * norm["weight"].view(1, -1, 1, 1) + norm["bias"].view(1, -1, 1, 1)).clamp_min(0)
        else:
            x = x.tanh()
        maps.append(x)
    return maps


def test_every_layer_is_the_formula() -> None:
    network, z = trained(), torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    expected = written_out(network.state_dict(), z, 4)
    assert [tuple(x.shape) for x in expected] == [(5, 6, 4, 4), (5, 5, 8, 8), (5, 4, 16, 16), (5, 3, 32, 32)]
    for layer, x in enumerate(expected, start=1):
        assert torch.allclose(network.features(z, layer), x, atol=1e-5), layer
    assert torch.equal(network(z), network.features(z, 4))
    assert network(z).abs().max() < 1


def test_weights_say_their_own_sizes() -> None:
    network = trained(9, (8, 4), 1)
    again = DCGANGenerator.shaped_like(network.state_dict()).eval()
    again.load_state_dict(network.state_dict())
    z = torch.randn(2, 9)
    assert torch.equal(again(z), network(z))
    many = DCGANGenerator(2, tuple(range(3, 15)), 1).state_dict()  # main.33 comes after main.6
    shapes = {name: value.shape for name, value in DCGANGenerator.shaped_like(many).state_dict().items()}
    assert shapes == {name: value.shape for name, value in many.items()}


def test_the_network_of_pytorch_s_example_has_these_names_and_shapes() -> None:
    state = DCGANGenerator(100, (512, 256, 128, 64), 3).state_dict()
    kernels = {name: tuple(value.shape) for name, value in state.items() if value.ndim == 4}
    assert kernels == {
        "main.0.weight": (100, 512, 4, 4),
        "main.3.weight": (512, 256, 4, 4),
        "main.6.weight": (256, 128, 4, 4),
        "main.9.weight": (128, 64, 4, 4),
        "main.12.weight": (64, 3, 4, 4),
    }


@pytest.mark.parametrize(("latent", "widths", "colours"), [(0, (4,), 3), (4, (), 3), (4, (4, 0), 3), (4, (4,), 0)])
def test_impossible_sizes_are_refused(latent: int, widths: tuple[int, ...], colours: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        DCGANGenerator(latent, widths, colours)


def test_layers_and_states_that_do_not_exist_are_refused() -> None:
    for layer in (0, 5):
        with pytest.raises(ValueError, match="there are 1 to 4"):
            trained().features(torch.zeros(1, 7), layer)
    with pytest.raises(ValueError, match="0 kernels"):
        DCGANGenerator.shaped_like({"weight": torch.zeros(3, 3)})
