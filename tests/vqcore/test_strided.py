"""The small convolutional network: sizes, the source's parameter counts, and its residual path."""

import pytest
import torch

from vqcore.networks.strided import ResidualStack, StridedDecoder, StridedEncoder


def test_sizes_and_parameters_are_the_sources():
    encoder, decoder = StridedEncoder(3, 128, 32, 2, 64), StridedDecoder(64, 128, 32, 2, 3)
    x = torch.randn(2, 3, 64, 64)
    z = encoder(x)
    assert z.shape == (2, 64, 16, 16)
    assert decoder(z).shape == x.shape
    counts = [sum(p.numel() for p in part.parameters()) for part in (encoder.body, encoder.project, decoder)]
    assert counts == [363_840, 8_256, 289_987]


def test_the_sum_takes_up_what_the_first_relu_left():
    stack = ResidualStack(4, 3, 1)
    x = torch.randn(1, 4, 5, 5)
    torch.nn.init.zeros_(stack.layers[0][2].weight)
    assert torch.equal(stack(x), x.clamp(min=0))


def test_a_side_that_two_strides_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="64 x 30"):
        StridedEncoder(3, 8, 4, 1, 4)(torch.zeros(1, 3, 64, 30))
