"""Lines as a set: no order, nothing of lines that are not real, and the layer's own equation."""

import pytest
import torch
import torch.nn.functional as F

from vqcore.networks.line_sets import PIECE, SetDecoder, SetEncoder, SetLayer


def some(lines: int = 7, pieces: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    real = torch.arange(lines).expand(2, -1) < torch.tensor([[lines], [4]])
    return torch.randn(2, lines, pieces * PIECE, 3, generator=drawn, dtype=torch.float64), real


def networks() -> tuple[SetEncoder, SetDecoder]:
    torch.manual_seed(0)
    return SetEncoder(8, 5, 2, 4).double(), SetDecoder(4, 8, 5, 2).double()


def test_sizes():
    encoder, decoder = networks()
    lines, real = some()
    z = encoder(lines, real)
    assert z.shape == (2, 7, 3, 4)
    assert decoder(z, real).shape == lines.shape


def test_lines_in_another_order_give_the_same_in_that_order():
    encoder, decoder = networks()
    lines, real = some()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    z = encoder(lines, real)
    torch.testing.assert_close(encoder(lines[:, order], real[:, order]), z[:, order])
    torch.testing.assert_close(decoder(z[:, order], real[:, order]), decoder(z, real)[:, order])


def test_each_line_listens_to_all_real_ones_and_to_no_other():
    encoder, _ = networks()
    lines, real = some()
    lines.requires_grad_()
    encoder(lines, real)[1, 0].sum().backward()
    heard = lines.grad.flatten(2).abs().sum(2) > 0
    assert heard.tolist() == [[False] * 7, [True] * 4 + [False] * 3]


def test_what_is_no_line_may_hold_anything():
    layer = SetLayer(6, 5).double()
    x, real = torch.randn(1, 4, 3, 6).double(), torch.tensor([[True, True, False, True]])
    plain = layer(x, real)
    x[0, 2] = torch.nan
    assert torch.equal(layer(x, real)[real], plain[real])


def test_lines_begin_smooth_also_where_pieces_meet():
    _, decoder = networks()
    made = decoder(torch.randn(2, 7, 3, 4).double(), some()[1])
    bent, gone = made.diff(dim=2).diff(dim=2).norm(dim=-1), made.diff(dim=2).norm(dim=-1)
    # Of points said one by one the ratio is sqrt(3).
    assert bent.mean() < 0.9 * gone.mean()
    seams = [PIECE * piece - 2 + shift for piece in (1, 2) for shift in range(2)]
    assert bent[:, :, seams].mean() < 1.5 * bent.mean()


def test_pieces_that_all_say_one_place_join_to_it():
    _, decoder = networks()
    torch.nn.init.zeros_(decoder.give.weight)
    with torch.no_grad():
        decoder.give.bias.copy_(
            torch.eye(PIECE, dtype=torch.float64)[0].repeat(3) * torch.tensor([1.0, 2, 3]).repeat_interleave(PIECE)
        )
    made = decoder(torch.randn(2, 7, 3, 4).double(), some()[1])
    torch.testing.assert_close(made, torch.tensor([1.0, 2, 3]).double().expand_as(made))


def test_the_layer_is_its_equation():
    """Three positions as a convolution that torch has."""
    torch.manual_seed(0)
    layer = SetLayer(6, 5).double()
    x, real = torch.randn(1, 4, 3, 6).double(), torch.tensor([[True, True, False, True]])
    weight = layer.near.weight.view(3, 5, 6).permute(1, 2, 0)
    bias = layer.near.bias.view(3, 5)
    seen = F.relu(x[0])
    near = F.conv1d(seen.transpose(1, 2), weight, padding=1).transpose(1, 2) + bias[1]
    near[:, 1:] += bias[0]
    near[:, :-1] += bias[2]
    whole = seen[real[0]].mean(0) @ layer.whole.weight.T
    expected = x[0] + F.relu(near + whole) @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(layer(x, real)[0], expected)


def test_points_that_do_not_fill_pieces_are_an_error():
    with pytest.raises(ValueError, match="lines of 40 points"):
        networks()[0](torch.zeros(1, 2, 40, 3).double(), torch.ones(1, 2, dtype=torch.bool))
