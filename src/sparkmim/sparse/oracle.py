"""Definition of a masked network: the dense network with every layer masked.

Simple rather than fast: `verify` and the tests compare packed networks with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SEE_ZEROS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
              "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
              "pad", "interpolate", "upsample"}  # fmt: skip
_PER_SAMPLE = {"group_norm", "instance_norm"}
_ADAPTIVE = {"adaptive_avg_pool1d": "mean", "adaptive_avg_pool2d": "mean", "adaptive_avg_pool3d": "mean",
             "adaptive_max_pool1d": "amax", "adaptive_max_pool2d": "amax", "adaptive_max_pool3d": "amax"}  # fmt: skip
_REDUCE = {"mean": 1, "sum": 1, "amax": 1, "amin": 1, "var": 1, "std": 1, "var_mean": 1, "std_mean": 1, "logsumexp": 1,
           "nanmean": 1, "nansum": 1, "norm": 2, "vector_norm": 2, "linalg_vector_norm": 2}  # fmt: skip
"""Reductions, with the position of their argument `dim`."""

_OVER_ALL = {"mean", "sum", "amax", "amin", "max", "min", "nansum"}
"""Reductions over all elements if called without axes."""

_MOMENTS = {"var", "std", "var_mean", "std_mean"}


class MaskedDense(TorchFunctionMode):
    """Runs the code in its scope on dense maps by the definition of the method.

    Convolution, pooling and resampling see zeros at masked positions; normalisation, global reductions and
    attention cover visible positions only. Other operations run unchanged: none of the above reads what they
    write to masked positions.

    Args:
        visible: bool `[B, *grid]`.
    """

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible
        self.rank = visible.ndim - 1

    def mask_of(self, x: Tensor, axes: Sequence[int] | None = None) -> Tensor | None:
        """Returns the mask `[B, *S]` of a map with spatial axes `axes` (by default those after the channels).

        None if `x` is not a map but, for example, pooled, padded or a weight.
        """
        if axes is None and x.ndim != self.rank + 2:
            return None
        axes = range(2, 2 + self.rank) if axes is None else axes
        if x.shape[0] != self.visible.shape[0] or len(axes) != self.rank or getattr(x, "_padded", False):
            return None
        mask = self.visible
        for position, axis in enumerate(axes, start=1):
            if x.shape[axis] % mask.shape[position]:
                return None
            mask = mask.repeat_interleave(x.shape[axis] // mask.shape[position], dim=position)
        return mask

    def flat_mask_of(self, x: Tensor, axis: int) -> Tensor | None:
        """Returns the mask `[B, positions]` of a map with flattened spatial axes, assuming patches of equal sides."""
        patches = self.visible[0].numel()
        side = round((x.shape[axis] / patches) ** (1 / self.rank))
        if x.shape[0] != self.visible.shape[0] or patches * side**self.rank != x.shape[axis]:
            return None
        mask = self.visible
        for position in range(1, 1 + self.rank):
            mask = mask.repeat_interleave(side, dim=position)
        return mask.flatten(1)

    def mask_among(self, x: Tensor, axes: Sequence[int]) -> tuple[Tensor | None, list[int]]:
        """Returns the mask of a map whose spatial axes are the last of `axes`, and these axes."""
        last = list(axes)[-self.rank :]
        if (mask := self.mask_of(x, last)) is not None:
            return mask, last
        if len(axes) == 1 and self.rank > 1 and not self._is_map(x):
            return self.flat_mask_of(x, axes[0]), list(axes)
        return None, []

    def _is_map(self, x: Tensor) -> bool:
        """Whether adjacent axes of `x` fit the mask."""
        return self._visible(x) is not x

    def _visible(self, x: Tensor) -> Tensor:
        """Returns the values of a map at visible positions, `[positions, …]`; other tensors unchanged."""
        for first in range(x.ndim - self.rank, 0, -1):  # the usual order of axes first
            axes = list(range(first, first + self.rank))
            if (mask := self.mask_of(x, axes)) is not None:
                return x.movedim(axes, list(range(1, 1 + self.rank)))[mask]
        return x

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "").strip("_")
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None:
            return func(*args, **kwargs)
        if name in _OVER_ALL and len(args) == 1 and not kwargs:
            return func(self._visible(x))
        if name in _REDUCE and (axes := _axes(x, name, args, kwargs)):
            mask, spatial = self.mask_among(x, axes)
            if mask is None:
                return func(*args, **kwargs)
            position = _REDUCE[name]
            if name in _MOMENTS and len(args) > position + 1:
                kwargs["unbiased"] = args[position + 1]  # the old signature (dim, unbiased, keepdim)
                args = (*args[: position + 1], *args[position + 2 :])
            kwargs = {key: value for key, value in kwargs.items() if key not in ("dim", "axis")}
            positional = args[position + 1] if len(args) > position + 1 else False
            keepdim = kwargs.pop("keepdim", kwargs.pop("keepdims", positional))
            return self._reduce(func, args[1:position], kwargs, x, mask, axes, spatial, keepdim)
        if name in ("softmax", "normalize"):
            axis = kwargs.get("dim", args[1] if name == "softmax" and len(args) > 1 else 1) % x.ndim
            flat = None if self._is_map(x) or axis == 0 else self.flat_mask_of(x, axis)
            if flat is not None:
                seen = flat.view(-1, *(flat.shape[1] if place == axis else 1 for place in range(1, x.ndim)))
                x = torch.where(seen, x, -torch.inf if name == "softmax" else 0.0)
            return func(x, *args[1:], **kwargs)
        if name == "matmul" and args[1].ndim == x.ndim > 2 and not self._is_map(x):
            flat = self.flat_mask_of(x, x.ndim - 1)
            if flat is not None:  # a sum over positions
                seen = flat.view(-1, *(1,) * (x.ndim - 3), flat.shape[1], 1)
                return func(x * seen.mT, torch.where(seen, args[1], 0))
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            flat = self.flat_mask_of(args[1], x.ndim - 2)
            assert flat is not None
            return func(*args, **{**kwargs, "attn_mask": flat.view(-1, *(1,) * (x.ndim - 2), flat.shape[1])})
        if (mask := self.mask_of(x)) is None:
            return func(*args, **kwargs)
        if name == "numel":
            return int(mask.sum()) * x.shape[1]
        if name in ("view", "reshape") and (out := func(*args, **kwargs)).shape[0] == 1 < x.shape[0]:
            # Folds the batch into the channels, for a convolution with separate weights per sample.
            return func(torch.where(mask.unsqueeze(1), x, 0), *args[1:], **kwargs)
        if name in _SEE_ZEROS:
            out = func(torch.where(mask.unsqueeze(1), x, 0), *args[1:], **kwargs)
            if name == "pad":
                out._padded = out.shape[2:] != x.shape[2:]  # the grid may divide its size by chance
            return out
        if name in _ADAPTIVE:
            spatial = list(range(2, x.ndim))
            return self._reduce(getattr(torch, _ADAPTIVE[name]), (), {}, x, mask, spatial, spatial, True)
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
        spatial: Sequence[int],
        keepdim: bool,
    ) -> Any:
        """Reduces over `axes`, over visible positions for the `spatial` ones among them."""
        others = [axis for axis in axes if axis not in spatial and axis != 0]
        maps = x.movedim([*spatial, *others], list(range(1, 1 + len(spatial) + len(others))))  # [B, *S, *others, …]
        count = len(others)

        def reduce(positions: Tensor) -> Any:  # [positions, *others, …]
            return func(positions.flatten(0, count), *lead, dim=0, **kwargs)

        if 0 in axes:
            results = [reduce(maps[mask])]
        else:
            results = [reduce(map_[seen]) for map_, seen in zip(maps, mask, strict=True)]

        def join(parts: Sequence[Tensor]) -> Tensor:
            out = parts[0] if 0 in axes else torch.stack(list(parts))
            for axis in sorted(axes) if keepdim else ():
                out = out.unsqueeze(axis)
            return out

        if isinstance(results[0], Tensor):
            return join(results)
        return tuple(join(parts) for parts in zip(*results, strict=True))


def _axes(x: Tensor, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Returns the axes of a reduction, sorted; empty if it has none."""
    dim = kwargs.get("dim", kwargs.get("axis", args[_REDUCE[name]] if len(args) > _REDUCE[name] else None))
    if isinstance(dim, bool) or dim is None:
        return []
    return sorted(axis % x.ndim for axis in (dim if isinstance(dim, Sequence) else [dim]))
