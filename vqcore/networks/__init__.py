"""Encoders and decoders that recipes compose around a quantizer."""
