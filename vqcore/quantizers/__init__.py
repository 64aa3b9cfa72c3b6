"""Quantizers: one file per method, all with the calls of `contract.Quantizer`."""

from vqcore.quantizers.contract import Quantized, Quantizer, VectorBatch, quantizers_in
from vqcore.quantizers.hyperbolic import HyperbolicQuantizer
from vqcore.quantizers.reparameterized import ReparameterizedQuantizer
from vqcore.quantizers.residual import ResidualQuantizer
from vqcore.quantizers.soft_gumbel import GumbelQuantizer
from vqcore.quantizers.soft_multinomial import MultinomialQuantizer
from vqcore.quantizers.soft_tempered import TemperedQuantizer
from vqcore.quantizers.space_filling import SpaceFillingQuantizer
from vqcore.quantizers.vector import VectorQuantizer

__all__ = [
    "GumbelQuantizer",
    "HyperbolicQuantizer",
    "MultinomialQuantizer",
    "Quantized",
    "Quantizer",
    "ReparameterizedQuantizer",
    "ResidualQuantizer",
    "SpaceFillingQuantizer",
    "TemperedQuantizer",
    "VectorBatch",
    "VectorQuantizer",
    "quantizers_in",
]
