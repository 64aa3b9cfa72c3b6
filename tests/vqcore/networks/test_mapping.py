"""StyleGAN2's mapping network against its formula."""

import pytest
import torch

from vqcore.networks.mapping import MappingNetwork


def test_every_layer_is_the_formula() -> None:
    torch.manual_seed(0)
    network = MappingNetwork((6, 8, 8, 5))
    for layer in range(3):
        torch.nn.init.normal_(network.get_submodule(f"fc{layer}").bias, std=30)
    z = torch.randn(4, 6, dtype=torch.float64)
    x = z / ((z**2).mean(1, keepdim=True) + 1e-8).sqrt()
    for layer in range(3):
        weight, bias = (network.state_dict()[f"fc{layer}.{name}"].double() for name in ("weight", "bias"))
        x = x @ weight.T * 0.01 / weight.shape[1] ** 0.5 + bias * 0.01
        x = torch.where(x > 0, x, 0.2 * x) * 2**0.5
        assert torch.allclose(network.double().features(z, layer + 1), x, atol=1e-9), layer
    assert torch.equal(network(z), network.features(z, 3))


def test_new_weights_keep_the_size_of_what_goes_through() -> None:
    """Equalised learning rate: at 1 / 0.01 their effect, the weights give outputs of about unit variance."""
    torch.manual_seed(0)
    w = MappingNetwork((512,) * 5)(torch.randn(256, 512))
    assert 0.7 < w.square().mean().sqrt() < 1.5


def test_weights_say_their_own_sizes() -> None:
    network = MappingNetwork((4, 7, 5))
    again = MappingNetwork.shaped_like(network.state_dict())
    again.load_state_dict(network.state_dict())
    z = torch.randn(3, 4)
    assert torch.equal(again(z), network(z))
    assert (again.latent_dim, again.num_layers) == (4, 2)


def test_what_does_not_exist_is_refused() -> None:
    for sizes in ((5,), (5, 0), ()):
        with pytest.raises(ValueError, match="at least"):
            MappingNetwork(sizes)
    for layer in (0, 3):
        with pytest.raises(ValueError, match="there are 1 to 2"):
            MappingNetwork((4, 7, 5)).features(torch.zeros(1, 4), layer)
    with pytest.raises(ValueError, match=r"no fc0\.weight"):
        MappingNetwork.shaped_like({"fc1.weight": torch.zeros(2, 2)})
