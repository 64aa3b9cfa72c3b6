"""The VQGAN encoder and decoder: the source's sizes, its blocks against plain formulas, rows that never mix."""

import math

import pytest
import torch
from torch import nn

from vqcore.networks.conv import Attention, ConvDecoder, ConvEncoder, Downsample, ResidualBlock, Upsample, group_norm


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("multipliers", "out_dim", "attention_levels", "encoder_parameters", "decoder_parameters"),
    [((1, 1, 2, 2, 4), 256, (4,), 29_298_176, 42_449_795), ((1, 2, 4), 3, (), 22_337_411, 32_960_771)],
    ids=["f=8 of the rotation trick's table 1", "f=4"],
)
def test_paper_sizes_have_as_many_parameters_as_the_source(
    multipliers: tuple[int, ...],
    out_dim: int,
    attention_levels: tuple[int, ...],
    encoder_parameters: int,
    decoder_parameters: int,
) -> None:
    """Counted on taming-transformers' own Encoder and Decoder (ch=128, 2 blocks, double_z=False)."""
    with torch.device("meta"):
        encoder = ConvEncoder(3, 128, multipliers, 2, out_dim, True, attention_levels)
        decoder = ConvDecoder(out_dim, 128, multipliers, 2, 3, True, attention_levels)
        assert parameters(encoder) == encoder_parameters
        assert parameters(decoder) == decoder_parameters
        features = encoder(torch.empty(1, 3, 256, 256))
        side = 256 // 2 ** (len(multipliers) - 1)
        assert features.shape == (1, out_dim, side, side)
        assert decoder(features).shape == (1, 3, 256, 256)


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 4), (1, 1, 2, 2)])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_one_down_sampling_fewer_than_multipliers_and_the_decoder_undoes_them(
    multipliers: tuple[int, ...], patch: int
) -> None:
    encoder = ConvEncoder(1, 8, multipliers, 1, 5, attention=False, patch=patch)
    decoder = ConvDecoder(5, 8, multipliers, 1, 1, attention=False, patch=patch)
    assert sum(isinstance(layer, Downsample) for layer in encoder.modules()) == len(multipliers) - 1
    assert sum(isinstance(layer, Upsample) for layer in decoder.modules()) == len(multipliers) - 1
    factor = patch * 2 ** (len(multipliers) - 1)
    assert encoder.factor == decoder.factor == factor
    features = encoder(torch.randn(2, 1, 2 * factor, 3 * factor))
    assert features.shape == (2, 5, 2, 3)
    assert decoder(features).shape == (2, 1, 2 * factor, 3 * factor)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """In float32 beside other neighbours; alone in float64 only, as convolutions round by batch size."""
    encoder = ConvEncoder(3, 16, (1, 2), 1, 8, True, (1,), patch=2)
    decoder = ConvDecoder(8, 16, (1, 2), 1, 3, True, (1,), patch=2)
    x = torch.randn(5, 3, 16, 16)
    others = 100 * torch.randn(5, 3, 16, 16)
    others[2] = x[2]
    assert (decoder(encoder(others))[2] - decoder(encoder(x))[2]).abs().max() < 1e-6
    encoder.double()
    decoder.double()
    whole = decoder(encoder(x.double()))
    assert (decoder(encoder(x[2:3].double())) - whole[2:3]).abs().max() < 1e-12


def test_residual_block_is_its_formula() -> None:
    block = ResidualBlock(8, 12)
    x = torch.randn(2, 8, 4, 4)

    def norm_swish(h: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
        groups = h.reshape(h.shape[0], norm.num_groups, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        scaled = centred / (groups.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return scaled.reshape(h.shape) * torch.sigmoid(scaled.reshape(h.shape))

    h = block.conv2(norm_swish(block.conv1(norm_swish(x, block.norm1)), block.norm2))
    assert isinstance(block.shortcut, nn.Conv2d)
    shortcut = torch.einsum("oc,bchw->bohw", block.shortcut.weight[:, :, 0, 0], x) + block.shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x), shortcut + h, rtol=1e-5, atol=1e-5)


def test_attention_is_softmax_over_positions_with_one_head() -> None:
    attention = Attention(6)
    x = torch.randn(2, 6, 3, 4)
    query, key, value = attention.query_key_value(attention.norm(x)).reshape(2, 3, 6, 12).unbind(1)
    expected = torch.zeros(2, 6, 12)
    for row in range(2):
        for i in range(12):
            scores = torch.stack([query[row, :, i] @ key[row, :, j] / math.sqrt(6) for j in range(12)])
            expected[row, :, i] = value[row] @ (scores.exp() / scores.exp().sum())
    torch.testing.assert_close(attention(x), x + attention.out(expected.reshape(x.shape)), rtol=1e-5, atol=1e-5)


def test_downsample_pads_right_and_below_only() -> None:
    down = Downsample(1)
    nn.init.ones_(down.conv.weight)
    nn.init.zeros_(down.conv.bias)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    sums = [[x[0, 0, i : i + 3, j : j + 3].sum() for j in (0, 2)] for i in (0, 2)]
    assert torch.equal(down(x)[0, 0], torch.tensor(sums))


def test_upsample_repeats_each_pixel() -> None:
    up = Upsample(1)
    nn.init.dirac_(up.conv.weight)
    nn.init.zeros_(up.conv.bias)
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert torch.equal(up(x)[0, 0], torch.kron(x[0, 0], torch.ones(2, 2)))


@pytest.mark.parametrize(
    ("channels", "groups"), [(128, 32), (512, 32), (64, 16), (32, 8), (48, 12), (3, 1), (1, 1), (97, 1)]
)
def test_groups_divide_and_keep_four_channels(channels: int, groups: int) -> None:
    norm = group_norm(channels)
    assert (norm.num_groups, norm.eps) == (groups, 1e-6)


@pytest.mark.parametrize(("levels", "count"), [((), 0), ((2,), 2), ((-1,), 2), ((2, -1), 2), ((0, -1), 4)])
def test_attention_levels_count_from_either_end(levels: tuple[int, ...], count: int) -> None:
    encoder = ConvEncoder(3, 8, (1, 2, 2), 2, 4, False, levels)
    assert sum(isinstance(layer, Attention) for layer in encoder.modules()) == count


def test_a_small_pair_learns_to_copy_images() -> None:
    encoder = ConvEncoder(3, 16, (1, 2), 1, 16, attention=False, patch=2)
    decoder = ConvDecoder(16, 16, (1, 2), 1, 3, attention=False, patch=2)
    images = torch.rand(4, 3, 2, 2).repeat_interleave(4, -1).repeat_interleave(4, -2)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    first = last = math.nan
    for step in range(60):
        loss = (decoder(encoder(images)) - images).square().mean()
        first, last = (loss.item() if step == 0 else first), loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert last < 0.1 * first  # a decoder that paints every image the mean colour stays above 0.2
    gradients = [p.grad for p in [*encoder.parameters(), *decoder.parameters()]]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_sides_that_do_not_divide_are_refused() -> None:
    encoder = ConvEncoder(3, 8, (1, 2, 2), 1, 4, patch=2)
    with pytest.raises(ValueError, match=r"60 x 64 pixels.*multiples of 8"):
        encoder(torch.zeros(1, 3, 60, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"blocks": 0}, "blocks=0"),
        ({"multipliers": ()}, "at least one multiplier"),
        ({"channels": -1}, "channels=-1"),
        ({"patch": 0}, "patch=0"),
        ({"attention_levels": (2,)}, "there are 2 levels"),
    ],
)
def test_impossible_networks_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvEncoder(**({"in_channels": 3, "channels": 8, "multipliers": (1, 2), "blocks": 1, "out_dim": 4} | arguments))
