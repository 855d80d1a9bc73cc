"""Gradient checkpointing: parts of a network keep their inputs alone, and compute again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
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
    again, and leave buffers, such as running statistics, alone.

    Raises:
        UserError: within the context, if a part changes its input in place.
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

    parts = _parts(network)
    before = [vars(part).get("forward") for part in parts.values()]
    for name, part in parts.items():
        part.forward = checkpointing_part(name, part, part.forward)
    try:
        yield
    finally:
        for part, forward in zip(parts.values(), before, strict=True):
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
    buffers = {
        (part, buffer): value.clone()
        for module in modules
        for part in module.modules()
        for buffer, value in part.named_buffers(recurse=False)
    }
    given = _copied(args)
    tensors = [item for arg in given for item in (arg if isinstance(arg, list | tuple) else [arg])]
    versions = _versions(tensors)
    again = False

    def compute() -> Any:
        nonlocal again
        used, again = _copied(given) if again else args, True
        return function(*used, **kwargs)

    contexts = lambda: (nullcontext(), _buffers(buffers))  # noqa: E731
    result = checkpoint(compute, use_reentrant=False, context_fn=contexts)
    if _versions(tensors) != versions:
        raise UserError(
            f"module {name} changes its input in place, and could not compute from it again; build it without "
            "inplace=True, or leave checkpoint_gradients out"
        )
    return result


@contextmanager
def _buffers(others: Mapping[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Gives modules other buffers within the context: those that they had when they computed first."""
    own = {(module, name): getattr(module, name) for module, name in others}
    for (module, name), buffer in others.items():
        setattr(module, name, buffer)
    try:
        yield
    finally:
        for (module, name), buffer in own.items():
            setattr(module, name, buffer)


def _copied(arguments: Sequence[Any]) -> list[Any]:
    """Copies lists among arguments: those of dense blocks grow."""
    return [list(arg) if isinstance(arg, list) else arg for arg in arguments]


def _versions(values: Sequence[Any]) -> list[int]:
    """Returns how often tensors were changed in place."""
    with DisableTorchFunctionSubclass():
        return [value._version for value in values if isinstance(value, Tensor)]


def _parts(network: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules within a network, by name, that have children and few enough layers."""
    parts: dict[str, nn.Module] = {}

    def layers(module: nn.Module, name: str) -> int:
        """Counts convolutions and matrices."""
        children = dict(module.named_children())
        if not children:
            return int(any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)))
        count = sum(layers(child, f"{name}.{own}") for own, child in children.items())
        if name and 0 < count <= _MOST_LAYERS and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            parts[name[1:]] = module
        return count

    layers(network, "")
    return parts
