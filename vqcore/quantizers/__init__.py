"""Quantizers: one file per method, all with the calls of `contract.Quantizer`."""

from vqcore.quantizers.contract import Quantized, Quantizer, VectorBatch, quantizers_in
from vqcore.quantizers.residual import ResidualQuantizer
from vqcore.quantizers.space_filling import SpaceFillingQuantizer
from vqcore.quantizers.vector import VectorQuantizer

__all__ = [
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SpaceFillingQuantizer",
    "VectorBatch",
    "VectorQuantizer",
    "quantizers_in",
]
