"""Definition of a masked network: a dense tensor that carries a mask of its own full shape.

A `MaskedTensor` holds zeros where it is hidden. Operations that move, split or join axes act on values and mask alike,
so nothing needs to know where the map's axes are. What an operation makes of hidden entries follows from what it is:

- elementwise operations are visible where all their operands are;
- reductions, normalisation and softmax cover visible entries;
- matrix products contract with zeros, and are visible where row and column are; attention sees visible keys;
- windows (convolution, pooling, resampling) see zeros, and give a map of the patch mask at its resolution. A window
  that gives another size, such as one of stride 1 without padding, leaves the map *off the grid*: nothing of it is
  hidden, until another window brings it back to the size that it would have had.

Simple rather than fast. What each function does is in `definition/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from sparkmim.errors import UserError
from sparkmim.sparse.layout import PatchLayout
from sparkmim.sparse.packed import Rule, UnsupportedOperation, map_first, name_of

_AnyRule = TypeVar("_AnyRule", bound=Rule)

DEFINITIONS: dict[str, Rule] = {}
"""What tensor functions do on masked tensors, by name, as `RULES` says it of packed ones."""


def define(*names: str) -> Callable[[_AnyRule], _AnyRule]:
    """Registers the decorated function as the definition of the tensor functions called `names`, as `register_rule`.

    Within it, masked tensors are plain tensors, zero where hidden, and so are results that it does not wrap.
    """

    def register(function: _AnyRule) -> _AnyRule:
        DEFINITIONS.update(dict.fromkeys(names, function))
        return function

    return register


class MaskedTensor(torch.Tensor):
    """Dense tensor with a mask of its own shape, zero where that is false.

    Attributes:
        mask: bool, of the shape of the tensor.
        patches: the mask of patches that it goes back to.
        grid_mask: of a map off the grid, `[B, C, *S]`, the mask that it would have on it, of the size that it would
            have; None on the grid.
    """

    mask: Tensor
    patches: PatchLayout
    grid_mask: Tensor | None

    @classmethod
    def wrap(cls, values: Tensor, mask: Tensor, patches: PatchLayout, grid_mask: Tensor | None = None) -> MaskedTensor:
        """Masks a tensor: zero where the mask, broadcast to its shape, is false."""
        mask = mask.expand(values.shape)
        return cls.of(values.masked_fill(~mask, 0), mask, patches, grid_mask)  # strides as before

    @classmethod
    def of(cls, values: Tensor, mask: Tensor, patches: PatchLayout, grid_mask: Tensor | None = None) -> MaskedTensor:
        """Makes a tensor of values that are zero where the mask is false; changes the class of `values` itself."""
        masked: MaskedTensor = values  # type: ignore[assignment]
        masked.__class__ = cls
        masked.mask, masked.patches, masked.grid_mask = mask, patches, grid_mask
        return masked

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The values as a plain tensor, zero where hidden."""
        with DisableTorchFunctionSubclass():
            return self.view_as(self)

    def like(self, values: Tensor) -> MaskedTensor:
        """Masks a result of the shape of this tensor as this tensor is."""
        return MaskedTensor.wrap(values, self.mask.to(values.device), self.patches, self.grid_mask)

    def on_map(self, function: Callable[[Tensor], Tensor]) -> MaskedTensor:
        """Applies a function of a map `[B, C, *S]`, zero where hidden, to one that patches divide."""
        return mask_map(function(self), self.patches)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = name_of(func)
        args, kwargs = map_first(args, kwargs)
        found = DEFINITIONS.get("im2col" if func is F.unfold else name.strip("_"))
        if found is None:
            raise UnsupportedOperation(
                f"`{name}` has no definition on masked images; write it with "
                f"sparkmim.sparse.define({name.strip('_')!r})"
            )
        if kwargs.get("out") is not None:
            raise UnsupportedOperation(f"`{name}` of a masked map with out= has no rule; use its result")
        with DisableTorchFunctionSubclass():
            return found(func, *args, **kwargs)


def mask_map(dense: Tensor, patches: PatchLayout) -> MaskedTensor:
    """Masks a dense map `[B, C, *S]` by patches, which divide its sizes."""
    if (block := blocks_of(dense, patches)) is None:
        raise UserError(f"a map of shape {list(dense.shape)} does not divide into {patches!r}")
    return MaskedTensor.wrap(dense, patches.upsampled(block).unsqueeze(1), patches)


def blocks_of(x: Tensor, patches: PatchLayout) -> tuple[int, ...] | None:
    """Returns the positions that each patch has in a map `[B, C, *S]`; None if it has no whole number, or no map."""
    if x.ndim != 2 + patches.rank or x.shape[0] != patches.batch_size:
        return None
    pairs = [divmod(size, cells) for size, cells in zip(x.shape[2:], patches.grid, strict=True)]
    return None if any(rest for _, rest in pairs) else tuple(block for block, _ in pairs)


def is_on_grid(x: MaskedTensor) -> bool:
    """Whether a tensor is a map `[B, C, *S]` that is hidden where its patches are."""
    block = blocks_of(x, x.patches) if x.grid_mask is None else None
    return block is not None and bool((x.mask == x.patches.upsampled(block).unsqueeze(1)).all())


def masked_among(values: Sequence[Any]) -> list[MaskedTensor]:
    """Returns the masked tensors among arguments, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, MaskedTensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += masked_among(value)
    return found


def is_constant(mask: Tensor, *axes: int) -> bool:
    """Whether a mask does not change along these axes."""
    varying = [axis for axis in axes if mask.shape[axis] > 1 and mask.stride(axis) != 0]
    return all(bool((mask == mask.narrow(axis, 0, 1)).all()) for axis in varying)


def by_position(func: Callable[..., Any], x: MaskedTensor, *axes: int) -> Tensor:
    """Returns the mask without axes along which it is constant."""
    if not is_constant(x.mask, *axes):
        raise UnsupportedOperation(
            f"`{func.__name__}` over the positions of a masked map, each by parameters of its own; over channels it is "
            "defined"
        )
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        mask = x.mask.select(axis, 0)
    return mask
