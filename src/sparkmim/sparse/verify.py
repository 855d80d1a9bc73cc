"""Check that a network is exact under masking: packed against dense, and packed against masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparkmim.errors import UserError
from sparkmim.sparse.layout import PatchLayout
from sparkmim.sparse.masked import MaskedTensor, is_on_grid, mask_map
from sparkmim.sparse.packed import PackedTensor, PendingTensor, UnsupportedOperation, naming_modules, pack, unpack

TOLERANCE = 1e-6
"""Largest relative error in float64 of an exact network. Round-off stays below 1e-9."""

_SMALLEST = 1e-300
"""Smallest norm to divide by."""


@dataclass
class VerifyReport:
    """Result of `verify`.

    Attributes:
        exact: whether the packed network is correct, forward and backward.
        error: largest relative error, by L2 norm, of a feature map or gradient; infinite if the network was refused.
        module: first module whose output differs or that was refused; if only a gradient differs, the module of its
            parameter; None if exact.
        message: summary in one line.
    """

    exact: bool
    error: float
    module: str | None
    message: str


MASKS = ("all visible", "partial mask", "ragged mask")


def verify_packed(
    network: nn.Module, shape: Sequence[int], grid: Sequence[int], seed: int = 0, masks: Sequence[str] = MASKS
) -> VerifyReport:
    """Compares a network on packed images with the same network on dense images and with the masked definition.

    Makes three comparisons in float64 and training mode, each forward and backward: all patches visible against the
    dense network; a partial mask against the definition (`MaskedTensor`), for images with other hidden pixels; and
    the same with different numbers of visible patches per sample.

    Args:
        network: maps images `[B, C, *S]` to a list of feature maps. Modified in place: converted to float64 and
            training mode, with noise added to constant parameters.
        shape: shape of the images, `[B, C, *S]`, with `B` at least 2.
        grid: patches along each axis.
        seed: seed of images, masks and random numbers drawn by the network.
        masks: masks to compare under, from `MASKS`.
    """
    network = network.double().train().requires_grad_()
    network.zero_grad()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # its random numbers depend on the memory layout of the map
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() > 1 and parameter.min() == parameter.max():
                # Initial zeros and ones (residual scales, GRN) would hide errors in what they multiply.
                noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                parameter.add_(noise, alpha=0.1)
    images = torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
    patches = int(torch.Size(grid).numel())
    worst = 0.0
    for kind in masks:
        visible = torch.zeros(shape[0], patches, dtype=torch.bool)
        for sample in range(shape[0]):
            extra = sample if kind == "ragged mask" else 0
            count = patches if kind == "all visible" else min(max(1, round(0.4 * patches)) + extra, patches)
            visible[sample, torch.randperm(patches, generator=generator)[:count]] = True
        visible = visible.view(shape[0], *grid)
        grads: dict[str, Tensor] = {}
        try:
            maps = _run(network, images, visible, packed=True, seed=seed, keep=grads.__setitem__)
        except UnsupportedOperation as refusal:
            at_fault = str(refusal).split("`")[1] if str(refusal).startswith("in module `") else None
            return VerifyReport(False, float("inf"), at_fault, f"NOT supported: {refusal}")
        except Exception:
            _check_runs(network, images)
            raise
        norms: dict[str, tuple[float, float]] = {}
        keep = partial(_take_norms, grads, norms)
        expected = _run(network, images, visible, packed=False, seed=seed, keep=keep)
        error, name, message = _compare(maps, expected, norms, kind)
        worst = max(worst, error)
        if error > TOLERANCE:
            if name is None:
                name = _first_to_differ(network, images, visible, seed)
                message += f"; `{name}` is the first to differ"
            return VerifyReport(False, error, name, f"NOT exact: {message}")
    return VerifyReport(True, worst, None, f"exact: worst relative error {worst:.1e}, forward and backward")


def _check_runs(network: nn.Module, images: Tensor) -> None:
    """Raises `UserError` if the network does not run on dense images of this size either."""
    try:
        with torch.no_grad():
            network(images)
    except Exception as error:
        size = "×".join(map(str, images.shape[2:]))
        raise UserError(
            f"the network does not run on images of {size}: {error}; give an image_size it takes"
        ) from error


class _InDouble(TorchFunctionMode):
    """Keeps float64 where a network casts to float32, as some normalisations do: round-off would hide errors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        others = (*args[1:], *(kwargs or {}).values())
        to_single = name == "float" or (name == "to" and any(value is torch.float32 for value in others))
        if to_single and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _run(
    network: nn.Module,
    images: Tensor,
    visible: Tensor,
    packed: bool,
    seed: int,
    keep: Callable[[str, Tensor], None],
) -> list[Tensor]:
    """Returns the feature maps, zero where masked; passes each gradient of their randomly weighted sum to `keep`."""

    def hand_over(name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:
            keep(name, parameter.grad)
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(hand_over, name))  # type: ignore[no-untyped-call]
        for name, parameter in network.named_parameters()
    ]
    try:
        with _keeping_buffers(network):
            maps = [_dense(map_, visible, packed) for map_ in _forward(network, images, visible, packed, seed)]
            found = [map_ for map_ in maps if map_ is not None]
            generator = torch.Generator().manual_seed(seed)
            weights = [torch.randn(map_.shape, dtype=map_.dtype, generator=generator) for map_ in found]
            sums = [(map_ * weight).sum() for map_, weight in zip(found, weights, strict=True)]
            torch.stack(sums).sum().backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return [map_.detach() for map_ in found]


def _take_norms(grads: dict[str, Tensor], norms: dict[str, tuple[float, float]], name: str, expected: Tensor) -> None:
    """Stores the norms of a gradient's error and of the gradient in `norms`, and frees both gradients."""
    norm = expected.norm().item()
    ours = grads.pop(name, None)
    error = torch.inf if ours is None else expected.sub_(ours).norm().item()
    norms[name] = (error, norm)


def _forward(network: nn.Module, images: Tensor, visible: Tensor, packed: bool, seed: int) -> list[Any]:
    torch.manual_seed(seed)
    if packed:
        with naming_modules(network), _InDouble():
            return list(network(pack(images, PatchLayout(visible))))
    with _InDouble():
        if visible.all():
            return list(network(images))
        masked = mask_map(images, PatchLayout(visible))
        noise = torch.where(masked.mask, images, images.roll(1, -1))  # what stands in hidden pixels changes nothing
        return list(network(mask_map(noise, masked.patches)))


@contextmanager
def _keeping_buffers(network: nn.Module) -> Iterator[None]:
    """Restores running statistics on exit, so that all runs start alike."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, saved in before:
                buffer.copy_(saved)


def _dense(value: Any, visible: Tensor, packed: bool) -> Tensor | None:
    """Returns a map with zeros at masked positions; None if `value` is not a tensor or has other axes."""
    if isinstance(value, PackedTensor):
        spatial = value.axes == tuple(range(2, value.ndim)) and len(value.axes) == visible.ndim - 1
        return unpack(value) if spatial else None
    if isinstance(value, MaskedTensor):
        return value.values if is_on_grid(value) else None
    return value if isinstance(value, Tensor) else None


def _first_to_differ(network: nn.Module, images: Tensor, visible: Tensor, seed: int) -> str | None:
    """Returns the first module, in order of execution, whose output differs."""

    def outputs(packed: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                value = None if isinstance(output, PendingTensor) else _dense(output, visible, packed)
                if value is not None:
                    found[name] = value.detach().clone()

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in network.named_modules() if name]
        try:
            with torch.no_grad(), _keeping_buffers(network):
                _forward(network, images, visible, packed, seed)
        finally:
            for handle in handles:
                handle.remove()
        return found

    ours, theirs = outputs(packed=True), outputs(packed=False)
    for name, output in ours.items():
        if name in theirs and _relative(output, theirs[name], floor=1e-12) > TOLERANCE:
            return name
    return None


def _compare(
    maps: list[Tensor], expected: list[Tensor], norms: dict[str, tuple[float, float]], kind: str
) -> tuple[float, str | None, str]:
    """Returns the largest relative error; for a gradient above the tolerance, its module; and a message on where."""
    worst = 0.0
    for index, (ours, theirs) in enumerate(zip(maps, expected, strict=True)):
        error = _relative(ours, theirs)
        worst = max(worst, error)
        if error > TOLERANCE:
            return error, None, f"feature map {index} is off by {error:.1e} ({kind})"
    # Gradients that are zero by construction (a bias before BatchNorm) consist of round-off from others.
    floor = max(1e-6 * max((norm for _, norm in norms.values()), default=0.0), _SMALLEST)
    for name, (difference, norm) in norms.items():
        error = difference / max(norm, floor)
        error = error if math.isfinite(error) else torch.inf
        worst = max(worst, error)
        if error > TOLERANCE:
            wrong = f"off by {error:.1e}" if math.isfinite(difference) else "missing or not finite"
            return error, name.rpartition(".")[0], f"the gradient of `{name}` is {wrong} ({kind})"
    return worst, None, ""


def _relative(ours: Tensor, theirs: Tensor, floor: float = _SMALLEST) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    error = (ours - theirs).norm() / theirs.norm().clamp(min=floor)
    return float("inf") if not torch.isfinite(error) else error.item()
