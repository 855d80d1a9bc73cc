"""The definition of a masked network, as simply as it can be written: the dense network, masked everywhere.

Slow on purpose. It is what `verify` and the tests hold the packed network against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SEE_ZEROS = ("conv1d", "conv2d", "conv3d", "max_pool1d", "max_pool2d", "max_pool3d",
              "avg_pool1d", "avg_pool2d", "avg_pool3d")  # fmt: skip
_GLOBAL = {"mean": "mean", "sum": "sum", "amax": "amax", "amin": "amin", "var": "var", "std": "std",
           "var_mean": "var_mean"}  # fmt: skip


class MaskedDense(TorchFunctionMode):
    """Runs the code in its scope on dense maps, by the definition of the method.

    Convolution and pooling see zeros at masked positions; normalisation and global reductions cover
    visible positions only. Everything else runs as it is: what it leaves at masked positions, no
    operation above ever reads.

    Args:
        visible: bool `[B, *grid]`.
    """

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible
        self.grid = visible.shape[1:]

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask `[B, 1, *S]` of a map `[B, C, *S]`, or None if it is no map (pooled, a weight)."""
        sizes = x.shape[2:]
        whole = x.ndim == self.visible.ndim + 1 and x.shape[0] == self.visible.shape[0]
        if not whole or any(size % cells for size, cells in zip(sizes, self.grid, strict=True)):
            return None
        mask = self.visible[:, None]
        for axis, (size, cells) in enumerate(zip(sizes, self.grid, strict=True), start=2):
            mask = mask.repeat_interleave(size // cells, dim=axis)
        return mask

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        mask = self.mask_of(x) if x is not None and name in _HANDLED else None
        if x is None or mask is None:
            return func(*args, **kwargs)
        if name in _SEE_ZEROS:
            return func(torch.where(mask, x, 0), *args[1:], **kwargs)
        if name == "batch_norm":
            rows = F.batch_norm(_visible(x, mask), *args[1:], **kwargs)  # [positions, C]
            out = rows.new_zeros(x.shape[0], *x.shape[2:], x.shape[1])
            out[mask[:, 0]] = rows
            return out.movedim(-1, 1)
        if name in ("group_norm", "instance_norm"):
            out = torch.zeros_like(x)
            for sample in range(x.shape[0]):
                seen = func(_visible(x[sample : sample + 1], mask[sample : sample + 1]).t()[None], *args[1:], **kwargs)
                out[sample].movedim(0, -1)[mask[sample, 0]] = seen[0].t()
            return out
        if name.startswith("adaptive"):
            reduction = "amax" if "max" in name else "mean"
            return self._reduce(reduction, x, mask, tuple(range(2, x.ndim)), True, {})
        dims = kwargs.pop("dim", args[1] if len(args) > 1 else None)
        keepdim = kwargs.pop("keepdim", args[2] if len(args) > 2 else False)
        if not isinstance(dims, tuple | list) or sorted(dim % x.ndim for dim in dims) != list(range(2, x.ndim)):
            return func(*args, **kwargs, **({} if dims is None or len(args) > 1 else {"dim": dims, "keepdim": keepdim}))
        return self._reduce(name, x, mask, tuple(dims), keepdim, kwargs)

    @staticmethod
    def _reduce(
        name: str, x: Tensor, mask: Tensor, dims: tuple[int, ...], keepdim: bool, kwargs: dict[str, Any]
    ) -> Any:
        results = [
            getattr(torch, name)(_visible(x[b : b + 1], mask[b : b + 1]), 0, **kwargs) for b in range(x.shape[0])
        ]  # each [C]
        shape = (x.shape[0], x.shape[1], *((1,) * (x.ndim - 2) if keepdim else ()))
        if isinstance(results[0], tuple):
            return tuple(torch.stack(parts).view(shape) for parts in zip(*results, strict=True))
        return torch.stack(results).view(shape)


_HANDLED = {*_SEE_ZEROS, *_GLOBAL, "batch_norm", "group_norm", "instance_norm",
            "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
            "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"}  # fmt: skip


def _visible(x: Tensor, mask: Tensor) -> Tensor:
    """The visible positions `[positions, C]` of a map `[B, C, *S]`."""
    return x.movedim(1, -1)[mask[:, 0]]
