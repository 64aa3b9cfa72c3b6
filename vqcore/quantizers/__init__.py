"""Quantizers: one file per method, all with the calls of `contract.Quantizer`."""

from vqcore.quantizers.contract import Quantized, Quantizer, VectorBatch, quantizers_in
from vqcore.quantizers.soft_gumbel import GumbelQuantizer
from vqcore.quantizers.soft_multinomial import MultinomialQuantizer
from vqcore.quantizers.soft_tempered import TemperedQuantizer
from vqcore.quantizers.vector import VectorQuantizer

__all__ = [
    "GumbelQuantizer",
    "MultinomialQuantizer",
    "Quantized",
    "Quantizer",
    "TemperedQuantizer",
    "VectorBatch",
    "VectorQuantizer",
    "quantizers_in",
]
