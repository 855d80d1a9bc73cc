"""The rules of packed tensors, one small file per family of operations. Importing it registers them."""

from sparkmim.sparse.rules import (
    attention,
    attributes,
    convolution,
    elementwise,
    normalization,
    pooling,
    reduction,
    resampling,
    shape,
)

__all__ = [
    "attention",
    "attributes",
    "convolution",
    "elementwise",
    "normalization",
    "pooling",
    "reduction",
    "resampling",
    "shape",
]
