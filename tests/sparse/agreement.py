"""Random masks, and the comparison of packed results with the definition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparkmim.sparse import MaskedTensor, PackedTensor, PatchLayout, mask_map, pack

TOLERANCE = 1e-10


def examples(count: int) -> settings:
    """Returns Hypothesis settings with `count` examples, the same in every run."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@st.composite
def masks(draw: st.DrawFn, rank: int | None = None, max_cells: int = 3, ragged: bool | None = None) -> Tensor:
    """Draws a mask, bool `[B, *grid]`, with 1 or more visible patches per sample; equally many unless `ragged`."""
    rank = draw(st.integers(1, 3)) if rank is None else rank
    grid = draw(st.lists(st.integers(1, max_cells if rank < 3 else 2), min_size=rank, max_size=rank))
    batch = draw(st.integers(1, 3))
    ragged = draw(st.booleans()) if ragged is None else ragged
    return random_mask(batch, grid, ragged, draw(st.integers(0, 10**6)))


def random_mask(batch: int, grid: Sequence[int], ragged: bool = False, seed: int = 0) -> Tensor:
    """Returns a random mask, bool `[batch, *grid]`, with equally many visible patches per sample unless `ragged`."""
    generator = torch.Generator().manual_seed(seed)
    cells = int(torch.Size(grid).numel())
    counts = torch.randint(1, cells + 1, (batch,), generator=generator)
    visible = torch.zeros(batch, cells, dtype=torch.bool)
    for sample in range(batch):
        count = int(counts[sample if ragged else 0])
        visible[sample, torch.randperm(cells, generator=generator)[:count]] = True
    return visible.view(batch, *grid)


def upsample(visible: Tensor, block: Sequence[int]) -> Tensor:
    """Returns the mask with `block` positions per patch."""
    sizes = [cells * extent for cells, extent in zip(visible.shape[1:], block, strict=True)]
    index = torch.meshgrid(
        *(torch.arange(size) // extent for size, extent in zip(sizes, block, strict=True)), indexing="ij"
    )
    return visible[(slice(None), *index)]


def dense_of(x: Any, block: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Returns the dense tensor of a result, zero where masked, and the mask of its defined values.

    Written with loops, to be independent of the engine. `block` is needed for maps with flattened spatial axes.
    """
    if not isinstance(x, PackedTensor):
        return x, torch.ones((), dtype=torch.bool)
    values, visible = x.values, x.patches.visible
    rest = [axis for axis in range(1, values.ndim) if axis not in x.axes]
    values = values.permute(0, *rest, *x.axes)
    flattened = len(x.axes) < visible.ndim - 1
    if flattened:
        assert block is not None
        values = values.unflatten(-1, tuple(block))
    rank, lead = visible.ndim - 1, len(rest)
    extents = values.shape[1 + lead :]
    sizes = [cells * extent for cells, extent in zip(visible.shape[1:], extents, strict=True)]
    dense = values.new_zeros(visible.shape[0], *values.shape[1 : 1 + lead], *sizes)
    for patch, (sample, *cell) in enumerate(visible.nonzero().tolist()):
        where = [slice(at * size, (at + 1) * size) for at, size in zip(cell, extents, strict=True)]
        dense[(sample, ..., *where)] = values[patch]
    mask = upsample(visible, extents).view(visible.shape[0], *(1,) * lead, *sizes)
    if flattened:
        dense, mask = dense.flatten(-rank), mask.flatten(-rank)
    order = [0, *rest, *x.axes]
    back = [order.index(axis) for axis in range(len(order))]
    return dense.permute(back), mask.permute(back)


def randomised(module: nn.Module) -> nn.Module:
    """Converts a module to float64 and randomises its parameters and buffers."""
    module = module.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, dtype=torch.float64, generator=generator))
    return module


def assert_close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Asserts equality up to `tolerance`, relative to the largest value or absolute, whichever is larger."""
    assert ours.shape == theirs.shape, f"{what}: shape {list(ours.shape)}, expected {list(theirs.shape)}"
    if not ours.numel():
        return
    error = (ours.double() - theirs.double()).abs().max().item()
    allowed = tolerance * max(1.0, theirs.double().abs().max().item())
    assert error <= allowed, f"{what} is off by {error:.1e}"


def as_list(out: Any) -> list[Any]:
    return list(out) if isinstance(out, tuple | list) else [out]


def agree(
    function: Callable[[Tensor], Any],
    visible: Tensor,
    block: Sequence[int],
    channels: int = 3,
    seed: int = 0,
    reference: Callable[[Tensor], Any] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Asserts that `function` agrees on packed tensors with the definition, forward and backward.

    Runs twice: under `visible`, against `reference` (by default `function`) of a masked map; and with every patch
    visible, against plain PyTorch. Compares all outputs, the gradients of the input and of the parameters, and the
    buffers if `function` is a module.
    """
    for mask, kind in ((visible, "under the mask"), (torch.ones_like(visible), "all visible")):
        packed = _run(function, mask, block, channels, seed)
        masked = kind == "under the mask"
        expected = reference if reference is not None and masked else function
        dense = _run(expected, mask, block, channels, seed, "masked" if masked else "plain", packed.shown)
        assert len(packed.outputs) == len(dense.outputs)
        for ours, theirs in zip(packed.outputs, dense.outputs, strict=True):
            assert ours.dtype == theirs.dtype
            assert_close(ours, theirs, f"the output {kind}", tolerance)
        assert packed.grads.keys() == dense.grads.keys(), kind
        for name, grad in dense.grads.items():
            assert_close(packed.grads[name], grad, f"the gradient of {name} {kind}", tolerance)
        for name, buffer in dense.buffers.items():
            assert_close(packed.buffers[name], buffer, f"the buffer {name} {kind}", tolerance)


@dataclass
class _Run:
    outputs: list[Tensor]  # dense, zero where masked
    shown: list[Tensor]  # their masks
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def _run(
    function: Callable[[Tensor], Any],
    visible: Tensor,
    block: Sequence[int],
    channels: int,
    seed: int,
    kind: str = "packed",
    shown: list[Tensor] | None = None,
) -> _Run:
    """Runs `function` on a packed, masked or plain map; output masks come from the packed run."""
    function = copy.deepcopy(function)  # equal running statistics
    module = function if isinstance(function, nn.Module) else None
    generator = torch.Generator().manual_seed(seed)
    sizes = [cells * extent for cells, extent in zip(visible.shape[1:], block, strict=True)]
    images = torch.randn(visible.shape[0], channels, *sizes, dtype=torch.float64, generator=generator)
    images.requires_grad_()
    parameters = {"input": images, **(dict(module.named_parameters()) if module else {})}
    torch.manual_seed(seed)
    if shown is None:
        dense = [dense_of(out, block) for out in as_list(function(pack(images, PatchLayout(visible))))]
        outputs, shown = [out for out, _ in dense], [mask for _, mask in dense]
    else:
        found = as_list(function(mask_map(images, PatchLayout(visible)) if kind == "masked" else images))
        outputs = [out.values if isinstance(out, MaskedTensor) else out for out in found]
        outputs = [torch.where(mask, out, out.new_zeros(())) for mask, out in zip(shown, outputs, strict=True)]
    total = images.new_zeros(())
    for number, out in enumerate(outputs):
        if out.is_floating_point():
            weight = torch.randn(out.shape, dtype=out.dtype, generator=generator.manual_seed(seed + 1 + number))
            total = total + (out * weight).sum()
    grads: dict[str, Tensor] = {}
    if total.requires_grad:
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        grads = {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}
    buffers = dict(module.named_buffers()) if module else {}
    return _Run([out.detach() for out in outputs], shown, grads, buffers)
