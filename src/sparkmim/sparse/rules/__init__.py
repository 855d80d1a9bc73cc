"""Rules of packed tensors, a file per family of operations. Importing this package registers them."""

from sparkmim.sparse.rules import attention, kernels, pointwise, reduction, resampling, shape

__all__ = ["attention", "kernels", "pointwise", "reduction", "resampling", "shape"]
