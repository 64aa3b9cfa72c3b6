"""Quantizers: one file per method, all with the calls of `contract.Quantizer`."""

from vqcore.quantizers.contract import Quantized, Quantizer, VectorBatch, quantizers_in
from vqcore.quantizers.hyperbolic import HyperbolicQuantizer
from vqcore.quantizers.reparameterized import ReparameterizedQuantizer
from vqcore.quantizers.vector import VectorQuantizer

__all__ = [
    "HyperbolicQuantizer",
    "Quantized",
    "Quantizer",
    "ReparameterizedQuantizer",
    "VectorBatch",
    "VectorQuantizer",
    "quantizers_in",
]
