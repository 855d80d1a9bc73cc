"""Gradient checkpointing: parts of a network keep their inputs alone, and compute again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from sparkmim.errors import UserError

_MOST_LAYERS = 8
"""Parts have at most so many layers: a block of every common network, and not a stage.

Measured on ResNet-50 and ConvNeXt-S: 4 give the same parts, 12 whole stages, which need more memory at a time.
"""


@contextmanager
def checkpointing(network: nn.Module) -> Iterator[None]:
    """Checkpoints the parts of a network, whichever it is, that are called within the context.

    Parts are the outermost modules of at most eight layers. They draw the same random numbers when they compute
    again, and leave buffers, such as running statistics, alone. A timm network that checkpoints itself is left to do
    so.

    Raises:
        UserError: within the context, if a part changes its input in place. If something else does so later, PyTorch
            raises a RuntimeError in the backward pass.
    """
    within = False

    def checkpointing_part(name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointing_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal within
            if within:
                return forward(*args, **kwargs)
            within = True
            try:
                return _checkpointed(name, [module], forward, *args, **kwargs)
            finally:
                within = False

        return checkpointing_forward

    parts = {} if any(getattr(module, "grad_checkpointing", False) for module in network.modules()) else _parts(network)
    before = {part: vars(part).get("forward") for part in parts}
    for part, name in parts.items():
        part.forward = checkpointing_part(name, part, part.forward)
    try:
        yield
    finally:
        for part, forward in before.items():
            if forward is None:
                del part.forward
            else:
                part.forward = forward


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """Calls a module, which keeps its arguments alone; modules among them are taken for parts of it.

    Does nothing else under torch.compile, which decides itself what to compute again.
    """
    if torch.compiler.is_compiling():
        return module(*args)
    parts = [module, *(arg for arg in args if isinstance(arg, nn.Module))]
    return _checkpointed(type(module).__name__, parts, module, *args)


def _checkpointed(name: str, modules: list[nn.Module], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    given = _copied((args, kwargs))  # the function may change lists and dictionaries, such as those of dense blocks
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    versions = _versions(tensors)
    again = False

    def compute(*_: Any) -> Any:
        nonlocal again
        if again:
            positional, named = _copied(given)
            return function(*positional, **named)
        again = True
        return function(*args, **kwargs)

    buffers = _Buffers(modules)
    # PyTorch restores the random generators of the devices of the arguments, and refuses arguments changed in place.
    result = checkpoint(compute, *tensors, use_reentrant=False, context_fn=lambda: (nullcontext(), buffers))
    if _versions(tensors) != versions:
        raise UserError(
            f"module {name} changes its input in place, and cannot compute from it again; build the network without "
            "inplace=True, or leave checkpoint_gradients out"
        )
    return result


class _Buffers:
    """Within this context, modules have the buffers that they had when it was made; it may be entered repeatedly."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.before = {
            (part, name): buffer.clone()
            for module in modules
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
        }
        self.own: dict[tuple[nn.Module, str], Tensor] = {}

    def __enter__(self) -> None:
        self.own = {(module, name): getattr(module, name) for module, name in self.before}
        for (module, name), buffer in self.before.items():
            setattr(module, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for (module, name), buffer in self.own.items():
            setattr(module, name, buffer)
        self.own = {}


def _copied(values: Any) -> Any:
    """Copies lists, tuples and dictionaries, within each other, around the same leaves."""
    return tree_map(lambda leaf: leaf, values)


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    """Returns how often tensors were changed in place."""
    with DisableTorchFunctionSubclass():
        return [tensor._version for tensor in tensors]


def _parts(network: nn.Module) -> dict[nn.Module, str]:
    """Returns the modules within a network that have children and few enough layers, with their names."""
    parts: dict[nn.Module, str] = {}

    def layers(module: nn.Module, name: str) -> int:
        """Counts convolutions and matrices."""
        children = dict(module.named_children())
        if not children:
            return int(any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)))
        count = sum(layers(child, f"{name}.{own}") for own, child in children.items())
        if name and 0 < count <= _MOST_LAYERS and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            parts.setdefault(module, name[1:])
        return count

    layers(network, "")
    return parts
