"""Quantizers: one file per method, all with the calls of `contract.Quantizer`."""

from vqcore.quantizers.contract import Quantized, Quantizer, VectorBatch, quantizers_in
from vqcore.quantizers.residual import ResidualQuantizer
from vqcore.quantizers.vector import VectorQuantizer

__all__ = ["Quantized", "Quantizer", "ResidualQuantizer", "VectorBatch", "VectorQuantizer", "quantizers_in"]
