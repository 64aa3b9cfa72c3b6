"""Codebooks, assignment, quantizers and the networks around them: tensors in, tensors out.

Shape legend used by every signature: B rows of a batch, T positions of a row, N vectors (all positions of all rows),
D dimensions of a vector, K codes of a codebook, L levels, C channels, H height, W width.
"""
