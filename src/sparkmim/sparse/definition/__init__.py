"""What each tensor function does on masked tensors; importing this registers it."""

from sparkmim.sparse.definition import pointwise, product, reduction, shape, windows

__all__ = ["pointwise", "product", "reduction", "shape", "windows"]
