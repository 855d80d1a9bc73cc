"""The feature hierarchy of any convolutional network: its last feature map at each stride, shallow to deep."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from sparkmim.errors import UserError, line_in

MAX_MAPS = 4
"""SparK decodes from the four deepest maps: strides 4 to 32 of an ordinary network."""

_PROBE_SIZES = {1: (4096, 3360), 2: (256, 224), 3: (128, 112)}
"""Image sizes to find the maps with, by rank: the first that all strides divide is used.

The network runs on the meta device, where nothing is computed, or on the CPU if an operation does not support that.
"""

_SHOWN_CANDIDATES = 12


class NoHierarchy(UserError):
    """No feature maps were found, or they do not divide the image."""


class Hierarchy(nn.Module):
    """Runs an unmodified encoder and returns its feature maps.

    The maps come from timm's `forward_intermediates` if the network has it, otherwise from its modules' outputs.

    Args:
        encoder: a module that computes feature maps from images `[B, C, *S]`; its output may be anything.
        channels: image channels `C`.
        rank: number of spatial axes.
        image_size: size per axis of networks that take one size only; timm's networks declare theirs.
        stages: number of feature maps to return, from the shallowest; None for all (at most four).
        feature_modules: names of the modules whose outputs are the maps, shallow to deep; None to find them.

    Attributes:
        strides: total stride of each map, ascending.
        channels: channels of each map.
        unreached: names of the encoder's parameters that no map depends on, such as a classifier's.

    Raises:
        NoHierarchy: if no hierarchy is found, or it is ambiguous; it is a ValueError.
        ValueError: if the encoder does not run on such images, or an argument does not fit it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        channels: int = 3,
        rank: int = 2,
        image_size: Sequence[int] | None = None,
        stages: int | None = None,
        feature_modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(encoder, torch._dynamo.eval_frame.OptimizedModule):
            raise UserError("the encoder is wrapped by torch.compile; pass the module itself")
        if rank not in _PROBE_SIZES:
            raise UserError(f"images have 1, 2 or 3 spatial axes, not {rank}")
        ranks = {len(module.kernel_size) for module in encoder.modules() if isinstance(module, _ConvNd)}
        if ranks and rank not in ranks:
            raise UserError(
                f"{type(encoder).__name__} convolves in {rank_of(encoder)}-D, but images of {rank} spatial axes were "
                "asked for; give image_size one number per axis"
            )
        self.encoder = encoder
        self._stages = stages
        self._feature_modules = None if feature_modules is None else _existing(encoder, feature_modules)
        sizes = [(size,) * rank for size in _PROBE_SIZES[rank]]
        if image_size is None:
            image_size = getattr(encoder, "default_cfg", {}).get("input_size", (0,))[1:]
        if len(image_size) == rank:
            sizes.append(tuple(image_size))
        refusals: list[ValueError] = []
        for self._device in ("meta", "cpu"):
            for size in sizes if self._device == "meta" else reversed(sizes):
                try:
                    self._find_maps((2, channels, *size))
                    return
                except UserError as refusal:
                    refusals.append(refusal)
            if not any("meta" in str(refusal).lower() for refusal in refusals):
                break  # values would not help: no operation was missing on the meta device
        # An error about the maps tells more than one about an image size that the network does not take.
        raise next((refusal for refusal in refusals if isinstance(refusal, NoHierarchy)), refusals[-1])

    def _find_maps(self, shape: tuple[int, ...]) -> None:
        """Chooses the maps by running the encoder on images of one shape."""
        self._indices: list[int] | None = None
        self._names: list[str] | None = None
        kind = type(self.encoder).__name__
        size = "×".join(map(str, shape[1:]))
        if self._feature_modules is not None:
            self._names = self._feature_modules
        elif hasattr(self.encoder, "forward_intermediates") and len(shape) == 4:
            shapes = [map_.shape for map_ in self._probe(shape, train=False)]
            self._indices = [i for _, i in _deepest([(_stride(shape, found), i) for i, found in enumerate(shapes)])]
            if not self._indices:
                shown = ", ".join("×".join(map(str, found[1:])) for found in shapes)
                raise NoHierarchy(f"no feature map of {kind} divides the image evenly: {size} gave {shown}")
        else:
            self._names = self._trace(shape)
        count = len(self._indices or self._names or ())
        if self._stages is not None and not 0 < self._stages <= count:
            raise UserError(f"stages is {self._stages}; {kind} has {count} to use, so it takes 1 to {count}")
        if self._indices is not None:
            self._indices = self._indices[: self._stages]
        if self._names is not None:
            self._names = self._names[: self._stages]

        inner: dict[str, int] = {}
        maps = self._probe(shape, train=True, inner=inner)
        self._coarsest = max(_alike(inner, self._inner_strides(_longer(shape))).values(), default=1)
        self.strides = tuple(_stride(shape, map_.shape) or 0 for map_ in maps)
        self.channels = tuple(map_.shape[1] for map_ in maps)
        if not all(self.strides) or list(self.strides) != sorted(set(self.strides)):
            shown = ", ".join("×".join(map(str, map_.shape[1:])) for map_ in maps)
            raise NoHierarchy(
                f"the feature maps of {kind} must divide the image evenly and have ascending strides: {size} gave "
                f"{shown}"
            )

    @property
    def stride(self) -> int:
        """Total stride of the encoder, that of its deepest map."""
        return self.strides[-1]

    @property
    def patch_unit(self) -> int:
        """Number that patch sizes must be multiples of: the stride, or that of a coarser map inside the network."""
        return math.lcm(self.stride, self._coarsest)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images `[B, C, *S]` to feature maps `[B, C_i, *(S / s_i)]`, shallow to deep."""
        if self._names is not None:
            return _run_until(self.encoder, images, self._names)
        extra: dict[str, Any] = {} if self._indices is None else {"indices": self._indices, "stop_early": True}
        encoder: Any = self.encoder
        maps: list[Tensor] = encoder.forward_intermediates(images, intermediates_only=True, **extra)
        return maps

    def _probe(self, shape: tuple[int, ...], train: bool, inner: dict[str, int] | None = None) -> list[Tensor]:
        """Returns the feature maps of a zero image; with `train`, sets `unreached`.

        `inner` receives the strides of the outputs of modules that may be maps.
        """
        twins = _twins(self, self._device, train)
        tensors = {name: twins[name] for name, _ in self.named_parameters()}
        dtype = next((tensor.dtype for tensor in tensors.values()), torch.float32)
        images = torch.zeros(shape, device=self._device, dtype=dtype)
        probe = _Probe(self, list(tensors.values()) if train else [])
        state = {f"hierarchy.{name}": tensor for name, tensor in twins.items()}
        handles = [] if inner is None else [
            module.register_forward_hook(_keep_stride(inner, name, shape))
            for name, module in self.encoder.named_modules()
        ]  # fmt: skip
        try:
            with torch.set_grad_enabled(train), _finding_maps(self.encoder, shape):
                maps, reached = functional_call(probe, state, (images,), tie_weights=False)
        finally:
            for handle in handles:
                handle.remove()
        if train:
            self.unreached = tuple(
                name.removeprefix("encoder.") for name, used in zip(tensors, reached, strict=True) if not used
            )
        return list(maps)

    def _inner_strides(self, shape: tuple[int, ...]) -> dict[str, int] | None:
        """Returns the strides of the outputs of modules that may be maps; None if the network takes no such images."""
        inner: dict[str, int] = {}
        try:
            self._probe(shape, train=False, inner=inner)
        except UserError:
            return None
        return inner

    def _trace(self, shape: tuple[int, ...]) -> list[str]:
        """Returns the names of the modules whose outputs are the maps.

        Raises:
            NoHierarchy: if there are none, or if maps get finer again, so that it is unclear which ones to use.
        """
        calls = _traced_calls(self.encoder, shape, self._device)
        try:
            longer = _traced_calls(self.encoder, _longer(shape), self._device)
        except UserError:  # a network that takes images of one size alone
            longer = calls
        for name, call in calls.items():
            if name not in longer or call.stride != longer[name].stride:
                call.stride = None  # not a map: another axis is as long as one of a map's by chance
        found = sorted((calls[name].done, name) for name in _units(self.encoder, calls))
        maps = [(calls[name].stride, name) for _, name in found if calls[name].times == 1]
        chosen = _deepest(maps)
        order = [name for _, name in maps]
        at = [order.index(name) for _, name in chosen]
        if chosen and at == sorted(at):
            last = calls[chosen[-1][1]]
            positions = math.prod(last.shape[2:])
            tokens = [call.shape for call in calls.values() if call.done > last.done and len(call.shape) == 3]
            if len(shape) > 3 and any(found[1] >= positions for found in tokens):
                raise NoHierarchy(
                    f"{type(self.encoder).__name__} goes on with tokens after its last feature map "
                    f"`{chosen[-1][1]}`, as a transformer; use a convolutional network, or name maps with "
                    "feature_modules=[...]"
                )
            return [name for _, name in chosen]
        candidates = [f"{name} {'×'.join(map(str, calls[name].shape[1:]))}" for stride, name in maps if stride]
        if not candidates:
            raise NoHierarchy(
                f"{type(self.encoder).__name__} has no module whose output is a {len(shape) - 2}-D feature map that "
                f"divides an image of {'×'.join(map(str, shape[1:]))} evenly; pad its convolutions"
            )
        left_out = len(candidates) - _SHOWN_CANDIDATES
        shown = ", ".join(candidates[:_SHOWN_CANDIDATES]) + (f" and {left_out} more" if left_out > 0 else "")
        raise NoHierarchy(
            f"the maps of {type(self.encoder).__name__} get finer again, so its encoder could be one of several; name "
            f"its maps, shallow to deep, with feature_modules=[...]: {shown}"
        )


def rank_of(encoder: nn.Module) -> int:
    """Returns the spatial axes of a network's images: those of its first convolution, 2 without one."""
    convolutions = (module for module in encoder.modules() if isinstance(module, _ConvNd))
    return next((len(module.kernel_size) for module in convolutions), 2)


def _existing(encoder: nn.Module, names: Sequence[str]) -> list[str]:
    known = [name for name, _ in encoder.named_modules() if name]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known[:5]
            raise UserError(
                f"{type(encoder).__name__} has no module named {name!r} for feature_modules; there is {', '.join(near)}"
            )
    if not names:
        raise UserError("feature_modules is empty; name at least one module, or leave it out")
    return list(names)


class _Probe(nn.Module):
    """Runs a hierarchy forward, and backward to find which of `tensors` the maps depend on.

    Both in one call, since gradient checkpointing runs the encoder again in the backward pass.
    """

    def __init__(self, hierarchy: Hierarchy, tensors: list[Tensor]) -> None:
        super().__init__()
        self.hierarchy = hierarchy
        self.tensors = tensors

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[bool]]:
        maps = self.hierarchy(images)
        if not self.tensors:
            return maps, []
        grads = torch.autograd.grad([map_.sum() for map_ in maps], self.tensors, allow_unused=True)
        return [map_.detach() for map_ in maps], [grad is not None for grad in grads]


def _twins(root: nn.Module, device: str, train: bool) -> dict[str, Tensor]:
    """Returns a zero tensor for each parameter and buffer, shared under all its names.

    `functional_call` can tie shared tensors itself, but does not restore modules registered under two names.
    """
    by_tensor: dict[int, Tensor] = {}
    twins: dict[str, Tensor] = {}
    for prefix, module in root.named_modules():
        own = (*module.named_parameters(recurse=False, remove_duplicate=False), *module.named_buffers(recurse=False))
        for name, tensor in own:
            if id(tensor) not in by_tensor:
                trains = train and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
                by_tensor[id(tensor)] = torch.zeros_like(tensor, device=device).requires_grad_(trains)
            twins[f"{prefix}.{name}" if prefix else name] = by_tensor[id(tensor)]
    return twins


@contextmanager
def _finding_maps(encoder: nn.Module, shape: Sequence[int]) -> Iterator[None]:
    """Reports errors of the network as a `UserError` that names the image size."""
    try:
        yield
    except NoHierarchy:
        raise
    except Exception as error:
        size = "×".join(map(str, shape[1:]))
        why = " ".join(str(error).split())
        raise UserError(
            f"{type(encoder).__name__} could not be run on an image of {size} to find its feature maps"
            f"{_place_of(error, type(encoder))}: {why}"
        ) from error


def _place_of(error: Exception, kind: type) -> str:
    """Returns where the code of a class raised an error, as ` (file.py:12)`; empty if that is not known."""
    try:
        own = inspect.getfile(kind)
    except (OSError, TypeError):
        return ""
    line = line_in({own}, error)
    return "" if line is None else f" ({Path(own).name}:{line})"


def _longer(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of images that are longer along the first axis, to tell maps by: they grow with the image."""
    batch, channels, first, *others = shape
    return batch, channels, first + first // 2, *others


def _alike(strides: dict[str, int], others: dict[str, int] | None) -> dict[str, int]:
    """Returns the strides by name that are the same for both sizes of images, or all without `others`."""
    return {name: stride for name, stride in strides.items() if others is None or others.get(name) == stride}


def _keep_stride(strides: dict[str, int], name: str, shape: Sequence[int]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        stride = _stride(shape, output.shape) if isinstance(output, Tensor) else None
        if stride is not None:
            strides[name] = max(stride, strides.get(name, 1))

    return hook


def _stride(image: Sequence[int], map_: Sequence[int]) -> int | None:
    """Returns the stride of a map `[B, C, *S]`; None if it is uneven, pooled to a point, or not a map."""
    if len(map_) != len(image) or all(size == 1 for size in map_[2:]):
        return None
    strides = {size / extent for size, extent in zip(image[2:], map_[2:], strict=True)}
    stride = strides.pop()
    return int(stride) if not strides and stride == int(stride) >= 1 else None


def _deepest(found: Sequence[tuple[int | None, Any]]) -> list[tuple[int, Any]]:
    """Returns the last entry, in order of execution, at each of the largest strides, ascending."""
    last: dict[int, Any] = {}
    for stride, entry in found:
        if stride is not None and stride > 1:  # no decoder block follows at full resolution
            last[stride] = entry
    return sorted(last.items())[-MAX_MAPS:]


@dataclass
class _Call:
    """Call of a traced module.

    Attributes:
        input: stride of the input.
        stride: stride of the output.
        shape: shape of the output.
        done: position in the order in which modules finished.
        times: number of calls so far.
    """

    input: int | None
    stride: int | None
    shape: Sequence[int]
    done: int
    times: int


def _traced_calls(encoder: nn.Module, shape: tuple[int, ...], device: str) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    count = 0

    def record(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal count
            count += 1
            first, out = (
                value.shape if isinstance(value, Tensor) else () for value in (inputs[0] if inputs else None, output)
            )
            times = calls[name].times + 1 if name in calls else 1
            calls[name] = _Call(_stride(shape, first), _stride(shape, out), out, count, times)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in encoder.named_modules() if name]
    twins = _twins(encoder, device, train=False)
    dtype = next((t.dtype for t in encoder.parameters()), torch.float32)
    try:
        with _finding_maps(encoder, shape):
            functional_call(encoder, twins, (torch.zeros(shape, device=device, dtype=dtype),), tie_weights=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _units(module: nn.Module, calls: dict[str, _Call], prefix: str = "") -> list[str]:
    """Returns the names of submodules that change the stride by a factor of at most 2, or have no children."""
    names = []
    for child_name, child in module.named_children():
        name = f"{prefix}{child_name}"
        call = calls.get(name)
        single_level = call is not None and call.stride and call.input and call.stride <= 2 * call.input
        if single_level or (call is not None and not list(child.children())):
            names.append(name)
        else:
            names += _units(child, calls, f"{name}.")
    return names


class _Done(Exception):
    """Raised once all maps are there, to skip the rest of the network."""


def _run_until(encoder: nn.Module, images: Tensor, names: list[str]) -> list[Tensor]:
    """Runs an encoder until all named modules have run, and returns their outputs."""
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise NoHierarchy(f"module {name!r} returns a {type(output).__name__}; name one that returns a map")
            maps[name] = output
            if len(maps) == len(names):
                raise _Done

        return hook

    handles = [encoder.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        encoder(images)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [maps[name] for name in names]
