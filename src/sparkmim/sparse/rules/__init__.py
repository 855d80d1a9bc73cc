"""The rules of packed tensors, one small file per family of operations. Importing it registers them."""

from sparkmim.sparse.rules import (
    attributes,
    convolution,
    elementwise,
    normalization,
    pooling,
    reduction,
    shape,
)

__all__ = ["attributes", "convolution", "elementwise", "normalization", "pooling", "reduction", "shape"]
