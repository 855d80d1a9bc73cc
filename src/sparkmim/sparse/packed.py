"""Tensor type for masked images that behaves as the dense map and stores only the visible patches.

A visible patch is a small image, so the visible patches of a batch form an ordinary tensor
`[n, C, *block]`. `PackedTensor` stores this tensor and appears to the network as the dense map
`[B, C, *S]`: `x.shape` is the dense shape, so shape arithmetic in a model's code gives the same result
as without a mask. Operations look up their rule by name in `RULES`. Most are elementwise and run on the
stored patches unchanged. An operation without a rule is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from sparkmim.errors import UserError
from sparkmim.sparse.layout import PatchLayout

Rule = Callable[..., Any]
"""Function `rule(func, *args, **kwargs)` that computes the tensor function `func` on packed arguments."""

_AnyRule = TypeVar("_AnyRule", bound=Rule)

RULES: dict[str, Rule] = {}
"""Rules by function name, without leading and trailing underscores."""

PENDING: set[str] = set()
"""Names of the functions whose rules accept a `PendingTensor`."""


class UnsupportedOperation(UserError, RuntimeError):
    """Raised for operations that are not defined on visible patches alone, or have no rule."""


def register_rule(*names: str, pending: bool = False) -> Callable[[_AnyRule], _AnyRule]:
    """Registers the decorated function as the rule of the tensor functions called `names`.

    Names have no leading and trailing underscores: `conv2d` means `torch.conv2d`; `add` means
    `torch.add`, `Tensor.add_` and `Tensor.__add__`; `get:shape` means the attribute `shape`. Inside a
    rule, packed tensors are plain tensors `[n, …]` of visible patches.

    Args:
        names: names of the tensor functions.
        pending: whether the rule accepts padded maps (`PendingTensor`).
    """

    def register(rule: _AnyRule) -> _AnyRule:
        RULES.update(dict.fromkeys(names, rule))
        if pending:
            PENDING.update(names)
        return rule

    return register


class PackedTensor(torch.Tensor):
    """Visible patches of a dense map, with the interface of that map.

    Attributes:
        patches: layout of the visible patches.
        axes: spatial axes in order: `(2, 3)` for a map `[B, C, H, W]`, `(1, 2)` for `[B, H, W, C]`;
            one axis for maps whose spatial axes were flattened into one.
        flat: positions per patch along each spatial axis before flattening; None if not flattened.

    The batch axis is always the first. The stored tensor differs from `shape` in two places: its first
    axis counts the `n` visible patches, and each spatial axis covers one patch.
    """

    patches: PatchLayout
    axes: tuple[int, ...]
    flat: tuple[int, ...] | None = None

    @classmethod
    def wrap(cls, values: Tensor, patches: PatchLayout, axes: tuple[int, ...]) -> PackedTensor:
        """Turns the patches `values` `[n, …]` into a packed tensor, without a copy.

        Changes the class of `values` itself: an alias would be a view, and for in-place operations on
        views autograd copies gradients.
        """
        packed: PackedTensor = values  # type: ignore[assignment]
        packed.__class__ = cls
        packed.patches = patches
        packed.axes = axes
        return packed

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """The stored patches as a plain tensor `[n, …]`."""
        with DisableTorchFunctionSubclass():
            return self.view_as(self)

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
        cls._check(name)
        rule = RULES.get(name.strip("_"))
        if rule is None:
            raise UnsupportedOperation(
                f"`{name}` has no rule for masked images. Replace the operation, give the encoder without "
                f"that part, or write a rule with sparkmim.sparse.register_rule({name.strip('_')!r})"
            )
        if kwargs.get("out") is not None:
            raise UnsupportedOperation(f"`{name}` of a masked map with out= has no rule; use its result")
        with DisableTorchFunctionSubclass():
            return rule(func, *args, **kwargs)

    @classmethod
    def _check(cls, name: str) -> None:
        """Raises `UnsupportedOperation` if this type of tensor does not allow the function `name`."""


class PendingTensor(PackedTensor):
    """Packed map in a shape that does not divide into patches, on its way into a convolution or pooling.

    Either `F.pad` has added a border, which is recorded here and not stored, or the batch is folded into the channels,
    `[1, B · C, *S]`, for a convolution with separate weights per sample. Only rules registered with `pending` accept
    it.

    Attributes:
        border: positions before and after the map, per spatial axis; negative where the map is cropped.
        border_mode: `constant`, `reflect`, `replicate` or `circular`.
        border_value: value of a constant border.
        folded: axis into which batch and channels are folded, 1 or 0; None if not folded.
    """

    border: tuple[tuple[int, int], ...]
    border_mode: str
    border_value: float
    folded: int | None

    @classmethod
    def of(
        cls,
        x: PackedTensor,
        border: tuple[tuple[int, int], ...] | None = None,
        mode: str = "constant",
        value: float = 0.0,
        folded: int | None = None,
    ) -> PendingTensor:
        """Returns the map `x` with a border, or folded. For use in rules."""
        pending: PendingTensor = x.view_as(x)  # type: ignore[assignment]
        pending.__class__ = cls
        pending.patches, pending.axes = x.patches, x.axes
        pending.border = border if border is not None else ((0, 0),) * len(x.axes)
        pending.border_mode, pending.border_value, pending.folded = mode, value, folded
        return pending

    @classmethod
    def _check(cls, name: str) -> None:
        if name.strip("_") not in PENDING:
            raise UnsupportedOperation(
                f"`{name}` of a masked map that was padded: a convolution or pooling must follow the padding directly"
            )

    def extends_by(self, value: float) -> bool:
        """Whether the border only adds positions of this value."""
        return self.border_mode == "constant" and self.border_value == value and min(map(min, self.border)) >= 0

    @property
    def bare(self) -> bool:
        """Whether the map has no border."""
        return not any(map(any, self.border))

    def settled(self, unfold: bool = False) -> PackedTensor:
        """Returns the map before padding; with `unfold`, before folding too."""
        if self.folded is not None and not unfold:
            raise UnsupportedOperation("a batch folded into the channels must be convolved, and unfolded again")
        return PackedTensor.wrap(self.values, self.patches, self.axes)


def map_first(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns arguments with the map, or the list of maps, in the first place, where rules take it."""
    kwargs = dict(kwargs or {})
    named = next((key for key in ("input", "self", "tensors") if key in kwargs), None)
    return (args, kwargs) if args or named is None else ((kwargs.pop(named),), kwargs)


def name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        owner: Any = func
        name = f"{name.strip('_')}:{owner.__self__.__name__}"
    return name


def block_of(x: PackedTensor) -> tuple[int, ...]:
    """Returns the positions per patch, per spatial axis. For use in rules, where `x.shape` is the stored shape."""
    return tuple(x.shape[axis] for axis in x.axes)


def dense_shape(x: PackedTensor) -> torch.Size:
    """Returns the shape of the dense map. For use in rules, where `x.shape` is the stored shape."""
    shape = list(x.shape)
    shape[0] = x.patches.batch_size
    if len(x.axes) == x.patches.rank:
        for axis, cells in zip(x.axes, x.patches.grid, strict=True):
            shape[axis] *= cells
        if isinstance(x, PendingTensor):
            for axis, border in zip(x.axes, x.border, strict=True):
                shape[axis] += sum(border)
            if x.folded is not None:
                together = shape[0] * shape[1]
                shape[:2] = [1, together] if x.folded == 1 else [together, 1]
    else:  # spatial axes flattened into one
        shape[x.axes[0]] *= math.prod(x.patches.grid)
    return torch.Size(shape)


def like(x: PackedTensor, values: Tensor, axes: tuple[int, ...] | None = None) -> PackedTensor:
    """Wraps the result of a rule with the layout of `x`; a result that is packed already (in place) is returned.

    `x` may be a `MaskedTensor` too, for a rule that is also its definition.
    """
    if not isinstance(x, PackedTensor):
        masked: PackedTensor = x.like(values)
        return masked
    if isinstance(values, PackedTensor):
        return values
    out = PackedTensor.wrap(values, x.patches, x.axes if axes is None else axes)
    if x.flat is not None and len(out.axes) < x.patches.rank:
        out.flat = x.flat
    return out


def as_autocast(x: Tensor) -> Tensor:
    """Casts to the type of autocast where that is on: it does not see what autograd functions compute inside."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def to_rows(x: Tensor) -> Tensor:
    """Reshapes patches `[n, C, *block]` to rows `[n · prod(block), C]`; a view if memory is channels-last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def from_rows(rows: Tensor, n: int, block: Sequence[int]) -> Tensor:
    """Reshapes rows `[n · prod(block), C]` to patches `[n, C, *block]`, a view in channels-last memory."""
    return rows.view(n, *block, rows.shape[-1]).movedim(-1, 1)


def gather_patches(dense: Tensor, patches: PatchLayout) -> Tensor:
    """Returns the visible patches of a dense map: `[B, C, *S]` to `[n, C, *block]` in channels-last memory."""
    return patches.by_patch(dense)[patches.index].contiguous().movedim(-1, 1)


def scatter_patches(values: Tensor, patches: PatchLayout) -> Tensor:
    """Returns the dense map of patches, zero where masked: `[n, *block, C]` to `[B, *S, C]`."""
    size = [cells * extent for cells, extent in zip(patches.grid, values.shape[1:-1], strict=True)]
    dense = values.new_zeros(patches.batch_size, *size, values.shape[-1])
    patches.by_patch(dense.movedim(-1, 1))[patches.index] = values
    return dense


# An autograd function must not return a view, or the network could not change it in place: the functions return
# channels last, and their callers move the axis.


class _Pack(torch.autograd.Function):
    """Packs a dense map `[B, C, *S]` into patches `[n, *block, C]`."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, patches: PatchLayout) -> Tensor:
        ctx.patches = patches
        return patches.by_patch(dense)[patches.index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scatter_patches(grads[0], ctx.patches).movedim(-1, 1), None


class _Unpack(torch.autograd.Function):
    """Unpacks patches `[n, C, *block]` into a dense map `[B, *S, C]`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, patches: PatchLayout) -> Tensor:
        ctx.patches = patches
        return scatter_patches(values.movedim(1, -1), patches)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_patches(grads[0].movedim(-1, 1), ctx.patches), None


def pack(dense: Tensor, patches: PatchLayout) -> PackedTensor:
    """Packs the visible patches of a dense map.

    Args:
        dense: `[B, C, *S]`, each spatial size a multiple of the grid's.
        patches: layout of the `B` samples.

    Returns:
        Packed tensor of shape `[B, C, *S]`, which stores `[n, C, *(S / grid)]`.

    Raises:
        ValueError: if the shape does not fit the layout.
    """
    expected = [patches.batch_size, dense.shape[1] if dense.ndim > 1 else 0]
    fits = dense.ndim == 2 + patches.rank and list(dense.shape[:2]) == expected
    if not fits or any(size % cells for size, cells in zip(dense.shape[2:], patches.grid, strict=True)):
        raise UserError(
            f"a map of shape {list(dense.shape)} does not divide into {patches.batch_size} samples of "
            f"{'×'.join(map(str, patches.grid))} patches"
        )
    axes = tuple(range(2, 2 + patches.rank))
    values: Tensor = _Pack.apply(dense, patches)
    return PackedTensor.wrap(values.movedim(-1, 1), patches, axes)


def unpack(x: PackedTensor, fill: Tensor | None = None) -> Tensor:
    """Returns the dense map `[B, C, *S]` of a packed one, with zeros or `fill` at masked positions.

    Args:
        x: packed map in the order `[B, C, *S]`.
        fill: values at masked positions, broadcast to the dense shape, such as `[1, C, 1, 1]`.

    Raises:
        ValueError: if the axes of `x` have another order.
    """
    if isinstance(x, PendingTensor):
        raise UnsupportedOperation("unpack of a masked map that was padded: a convolution or pooling must follow")
    if x.axes != tuple(range(2, 2 + x.patches.rank)) or x.dim() != 2 + x.patches.rank:
        raise UserError(f"unpack needs a map in the order [B, C, *S], not {list(x.shape)} with *S at axes {x.axes}")
    with DisableTorchFunctionSubclass():
        dense: Tensor = _Unpack.apply(x.values, x.patches).movedim(-1, 1)
        if fill is None:
            return dense
        visible = x.patches.upsampled(block_of(x)).unsqueeze(1)  # [B, 1, *S]
        return torch.where(visible, dense, fill.to(dense.dtype))


def on_dense_map(x: PackedTensor, name: str, function: Callable[[Tensor], Tensor]) -> PackedTensor:
    """Applies an operation to the dense map, zero where masked, and packs the result.

    For local operations without a faster rule: exact by the definition of the method, at the cost of a dense network.

    Args:
        x: map in the order `[B, C, *S]`, with or without a border.
        name: name of the operation, for errors.
        function: maps a dense map to one that divides into patches.

    Raises:
        UnsupportedOperation: if the result does not divide into patches.
    """
    if not isinstance(x, PackedTensor):
        masked: PackedTensor = x.on_map(function)
        return masked
    rank, patches = x.patches.rank, x.patches
    if x.axes != tuple(range(2, 2 + rank)) or x.ndim != 2 + rank:
        raise UnsupportedOperation(f"`{name}` of a masked map {list(dense_shape(x))} whose channels are not second")
    dense = unpack(x.settled() if isinstance(x, PendingTensor) else x)
    if isinstance(x, PendingTensor):
        sizes = [size for pair in reversed(x.border) for size in pair]
        dense = F.pad(dense, sizes, x.border_mode, x.border_value if x.border_mode == "constant" else None)
    out = function(dense)
    if any(size % cells for size, cells in zip(out.shape[2:], patches.grid, strict=True)):
        raise UnsupportedOperation(
            f"`{name}` turns a masked map {list(dense_shape(x))} into {list(out.shape)}, which the grid of "
            f"{'×'.join(map(str, patches.grid))} patches does not divide"
        )
    return pack(out, patches)


@contextmanager
def naming_modules(root: nn.Module) -> Iterator[None]:
    """Adds the path of the failing module within `root` to every `UnsupportedOperation`."""
    try:
        yield
    except UnsupportedOperation as error:
        names = {id(module): name for name, module in root.named_modules()}
        path, traceback = "", error.__traceback__
        while traceback is not None:
            module = traceback.tb_frame.f_locals.get("self")
            path = names.get(id(module), path) or path
            traceback = traceback.tb_next
        raise UnsupportedOperation(f"in module `{path or type(root).__name__}`: {error}") from error
