"""The definition of a masked network, as simply as it can be written: the dense network, masked everywhere.

Slow on purpose. It is what `verify` and the tests hold the packed network against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SEE_ZEROS = {"conv1d", "conv2d", "conv3d", "max_pool1d", "max_pool2d", "max_pool3d",
              "avg_pool1d", "avg_pool2d", "avg_pool3d"}  # fmt: skip
_PER_SAMPLE = {"group_norm", "instance_norm"}
_ADAPTIVE = {"adaptive_avg_pool1d": "mean", "adaptive_avg_pool2d": "mean", "adaptive_avg_pool3d": "mean",
             "adaptive_max_pool1d": "amax", "adaptive_max_pool2d": "amax", "adaptive_max_pool3d": "amax"}  # fmt: skip
_REDUCE = {"mean": 1, "sum": 1, "amax": 1, "amin": 1, "var": 1, "std": 1, "var_mean": 1, "std_mean": 1,
           "norm": 2, "vector_norm": 2, "linalg_vector_norm": 2}  # fmt: skip
"""Reductions, and at which position their axes stand."""


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
        self.rank = visible.ndim - 1

    def mask_of(self, x: Tensor, axes: Sequence[int] | None = None) -> Tensor | None:
        """The mask `[B, *S]` of a map whose spatial axes stand at `axes` (by default after the channels).

        None if `x` is no map: something pooled, or a weight.
        """
        axes = range(2, 2 + self.rank) if axes is None else axes
        if x.ndim != self.rank + 2 or len(axes) != self.rank or x.shape[0] != self.visible.shape[0]:
            return None
        mask = self.visible
        for position, axis in enumerate(axes, start=1):
            if x.shape[axis] % mask.shape[position]:
                return None
            mask = mask.repeat_interleave(x.shape[axis] // mask.shape[position], dim=position)
        return mask

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None:
            return func(*args, **kwargs)
        if name in _REDUCE and (axes := _axes(x, name, args, kwargs)) and 0 not in axes:
            if (mask := self.mask_of(x, axes)) is None:
                return func(*args, **kwargs)
            position = _REDUCE[name]
            kwargs = {key: value for key, value in kwargs.items() if key not in ("dim", "axis")}
            given = args[position + 1] if len(args) > position + 1 else False
            keepdim = kwargs.pop("keepdim", kwargs.pop("keepdims", given))
            return self._reduce(func, args[1:position], kwargs, x, mask, axes, keepdim)
        if (mask := self.mask_of(x)) is None:
            return func(*args, **kwargs)
        if name in _SEE_ZEROS:
            return func(torch.where(mask.unsqueeze(1), x, 0), *args[1:], **kwargs)
        if name in _ADAPTIVE:
            return self._reduce(getattr(torch, _ADAPTIVE[name]), (), {}, x, mask, list(range(2, x.ndim)), True)
        if name == "batch_norm":
            normed = F.batch_norm(x.movedim(1, -1)[mask], *args[1:], **kwargs)  # [positions, C]
            out = normed.new_zeros(x.shape[0], *x.shape[2:], x.shape[1])
            out[mask] = normed
            return out.movedim(-1, 1)
        if name in _PER_SAMPLE:
            out = torch.zeros_like(x)
            for sample, seen in enumerate(mask):
                positions = x[sample].movedim(0, -1)[seen].t()[None]  # [1, C, positions]
                out[sample].movedim(0, -1)[seen] = func(positions, *args[1:], **kwargs)[0].t()
            return out
        return func(*args, **kwargs)

    @staticmethod
    def _reduce(
        func: Callable[..., Any],
        lead: tuple[Any, ...],
        kwargs: dict[str, Any],
        x: Tensor,
        mask: Tensor,
        axes: Sequence[int],
        keepdim: bool,
    ) -> Any:
        maps = x.movedim(list(axes), list(range(1, 1 + len(axes))))  # [B, *S, …]
        results = [func(map_[seen], *lead, dim=0, **kwargs) for map_, seen in zip(maps, mask, strict=True)]

        def join(parts: Sequence[Tensor]) -> Tensor:
            out = torch.stack(list(parts))
            for axis in sorted(axes) if keepdim else ():
                out = out.unsqueeze(axis)
            return out

        if isinstance(results[0], Tensor):
            return join(results)
        return tuple(join(parts) for parts in zip(*results, strict=True))


def _axes(x: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The axes a reduction is over, none of them if it is over everything or just one."""
    dim = kwargs.get("dim", kwargs.get("axis", args[_REDUCE[name]] if len(args) > _REDUCE[name] else None))
    if isinstance(dim, bool) or dim is None:
        return []
    return sorted(axis % x.ndim for axis in (dim if isinstance(dim, Sequence) else [dim]))
