"""A tensor type for masked images: it behaves as the dense map and stores the visible patches only.

A visible patch is a small image, and all visible patches of a batch are an ordinary tensor
`[n, C, *block]`. `PackedTensor` stores just that, and presents itself to the network as the dense map
`[B, C, *S]` whose masked positions are hidden: `x.shape` is the dense shape, so any shape arithmetic in
a model's code comes out as it would without a mask. Operations on it look their rule up by name in
`RULES`; most are elementwise and run on the stored patches unchanged. One without a rule is refused.
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
"""`rule(func, *args, **kwargs)`: computes `func`, the tensor function that was called, on packed arguments."""

_AnyRule = TypeVar("_AnyRule", bound=Rule)

RULES: dict[str, Rule] = {}
"""Rules by the name of the function, without leading and trailing underscores."""

PENDING: set[str] = set()
"""Names of the rules that know what to do with a `PendingTensor`."""


class UnsupportedOperation(UserError, RuntimeError):
    """An operation that has no exact meaning on visible patches alone, or no rule yet."""


def register_rule(*names: str, pending: bool = False) -> Callable[[_AnyRule], _AnyRule]:
    """Registers the decorated function as the rule of the tensor functions called `names`.

    A name is that of the function without leading and trailing underscores: `conv2d` stands for
    `torch.conv2d`, `add` for `torch.add`, `Tensor.add_` and `Tensor.__add__` alike; `get:shape` for the
    attribute `shape`. Inside a rule, packed tensors are plain tensors `[n, …]` of visible patches.

    Args:
        names: of the functions.
        pending: whether the rule takes maps to which `F.pad` has added a border (`PendingTensor`).
    """

    def register(rule: _AnyRule) -> _AnyRule:
        RULES.update(dict.fromkeys(names, rule))
        if pending:
            PENDING.update(names)
        return rule

    return register


class PackedTensor(torch.Tensor):
    """The visible patches of a dense map, posing as that map.

    Attributes:
        patches: the layout that says which patches these are.
        axes: where the spatial axes stand, in order. `(2, 3)` for a map `[B, C, H, W]`, `(1, 2)` for
            `[B, H, W, C]`; a single one for maps whose spatial axes have been flattened into one.
        flat: positions per patch along each spatial axis, of a map that was flattened; None for others.

    The batch axis is always the first. What is stored differs from what `shape` tells in two places:
    the batch axis holds the `n` visible patches, each spatial axis one patch's share of the axis.
    """

    patches: PatchLayout
    axes: tuple[int, ...]
    flat: tuple[int, ...] | None = None

    @classmethod
    def wrap(cls, values: Tensor, patches: PatchLayout, axes: tuple[int, ...]) -> PackedTensor:
        """Makes a packed tensor of patches `values` `[n, …]`, without a copy.

        The object itself changes class: an alias would be a view, on which autograd makes every
        in-place operation of the network copy its gradient.
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
        name = _name_of(func)
        if not args and kwargs and (given := next((key for key in ("input", "self") if key in kwargs), None)):
            kwargs = dict(kwargs)
            args = (kwargs.pop(given),)  # rules take the map first
        cls._check(name)
        rule = RULES.get(name.strip("_"))
        if rule is None:
            raise UnsupportedOperation(
                f"`{name}` has no rule for masked images. Replace the operation, give the encoder without "
                f"that part, or write a rule with sparkmim.sparse.register_rule({name.strip('_')!r})"
            )
        if kwargs and kwargs.get("out") is not None:
            raise UnsupportedOperation(f"`{name}` of a masked map with out= has no rule; use its result")
        with DisableTorchFunctionSubclass():
            return rule(func, *args, **(kwargs or {}))

    @classmethod
    def _check(cls, name: str) -> None:
        """Raises an `UnsupportedOperation` if the kind of tensor does not allow a function."""


class PendingTensor(PackedTensor):
    """A packed map on its way into a convolution or pooling, in a shape that does not divide into patches.

    It has a border that `F.pad` has added and that is not laid down yet, or its batch is folded into the channels,
    `[1, B · C, *S]`, for a convolution with weights of each sample's own. What follows reads it as it needs it;
    nothing else is defined on such a map.

    Attributes:
        border: positions before and after the map, per spatial axis; negative where the map is cropped.
        border_mode: what fills it: `constant`, `reflect`, `replicate` or `circular`.
        border_value: of a constant border.
        folded: the axis into which batch and channels are folded, 1 or 0; None if they are not.
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
        """The same map with a border, or folded. For rules."""
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
        """Whether the border is nothing but more positions of that value."""
        return self.border_mode == "constant" and self.border_value == value and min(map(min, self.border)) >= 0

    @property
    def bare(self) -> bool:
        """Whether there is no border."""
        return not any(map(any, self.border))

    def settled(self, unfold: bool = False) -> PackedTensor:
        """The map as it was before padding; with `unfold`, before folding too."""
        if self.folded is not None and not unfold:
            raise UnsupportedOperation("a batch folded into the channels must be convolved, and unfolded again")
        return PackedTensor.wrap(self.values, self.patches, self.axes)


def _name_of(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        owner: Any = func
        name = f"{name.strip('_')}:{owner.__self__.__name__}"
    return name


def block_of(x: PackedTensor) -> tuple[int, ...]:
    """Positions per patch along each spatial axis. For rules: `x` is seen as the plain tensor it stores."""
    return tuple(x.shape[axis] for axis in x.axes)


def dense_shape(x: PackedTensor) -> torch.Size:
    """The shape of the dense map that `x` stands for. For rules, as `block_of`."""
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
    """Wraps the result of a rule with the layout of `x`. What is packed already (in-place operations) stays."""
    if isinstance(values, PackedTensor):
        return values
    out = PackedTensor.wrap(values, x.patches, x.axes if axes is None else axes)
    if x.flat is not None and len(out.axes) < x.patches.rank:
        out.flat = x.flat
    return out


def to_rows(x: Tensor) -> Tensor:
    """`[n, C, *block]` to `[n · prod(block), C]`, a view where memory is channels-last."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def from_rows(rows: Tensor, n: int, block: Sequence[int]) -> Tensor:
    """`[n · prod(block), C]` to `[n, C, *block]` in channels-last memory, a view."""
    return rows.view(n, *block, rows.shape[-1]).movedim(-1, 1)


def gather_patches(dense: Tensor, patches: PatchLayout) -> Tensor:
    """The visible patches of a dense map: `[B, C, *S]` to `[n, C, *block]` in channels-last memory."""
    return _by_patch(dense, patches)[patches.index].contiguous().movedim(-1, 1)


def scatter_patches(values: Tensor, patches: PatchLayout) -> Tensor:
    """A dense map with zeros at masked positions: `[n, *block, C]` to `[B, *S, C]`."""
    size = [cells * extent for cells, extent in zip(patches.grid, values.shape[1:-1], strict=True)]
    dense = values.new_zeros(patches.batch_size, *size, values.shape[-1])
    _by_patch(dense.movedim(-1, 1), patches)[patches.index] = values
    return dense


def _by_patch(dense: Tensor, patches: PatchLayout) -> Tensor:
    """A view `[B, *grid, *block, C]` of a dense map `[B, C, *S]`."""
    rank = patches.rank
    split = dense
    for axis, cells in reversed(list(enumerate(patches.grid, start=2))):
        split = torch.unflatten(split, axis, (cells, -1))  # [B, C, grid_1, block_1, grid_2, block_2, …]
    grid, block = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    return split.permute(0, *grid, *block, 1)


# What an autograd function returns must not be a view, or the network could not work on it in place:
# channels are last inside, and moved outside.


class _Pack(torch.autograd.Function):
    """`[B, C, *S]` to `[n, *block, C]`."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, patches: PatchLayout) -> Tensor:
        ctx.patches = patches
        return _by_patch(dense, patches)[patches.index]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return scatter_patches(grads[0], ctx.patches).movedim(-1, 1), None


class _Unpack(torch.autograd.Function):
    """`[n, C, *block]` to `[B, *S, C]`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, patches: PatchLayout) -> Tensor:
        ctx.patches = patches
        return scatter_patches(values.movedim(1, -1), patches)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_patches(grads[0].movedim(-1, 1), ctx.patches), None


def pack(dense: Tensor, patches: PatchLayout) -> PackedTensor:
    """Keeps the visible patches of dense maps.

    Args:
        dense: `[B, C, *S]`, each spatial size a multiple of the grid's.
        patches: the layout of `B` samples.

    Returns:
        A packed tensor of dense shape `[B, C, *S]` that stores `[n, C, *(S / grid)]`.

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
    """The dense map `[B, C, *S]`: visible positions from `x`, the others zero or `fill`.

    Args:
        x: a packed map in the order `[B, C, *S]`.
        fill: what stands at masked positions; broadcast to the dense shape, `[1, C, 1, 1]` for example.

    Raises:
        ValueError: if the axes of `x` stand in another order.
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
    """Computes an operation on the dense map, zero where masked, and keeps its visible patches.

    For local operations without a faster way: exact by the definition of the method, and as dear as without a mask.

    Args:
        x: a map in the order `[B, C, *S]`, with a border or without.
        name: of the operation.
        function: from a dense map to one that the patch grid divides.

    Raises:
        UnsupportedOperation: if the result does not divide into patches.
    """
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
    """Adds the path of the module at fault, as `root` names it, to errors of operations without a rule."""
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
