"""Encoders by name: timm, torchvision, or a function in a file."""

from __future__ import annotations

import copy
import difflib
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from torch import nn

from sparkmim.arguments import listed, nearest
from sparkmim.errors import UserError, line_in
from sparkmim.trust import remember


def create_encoder(
    name: str | nn.Module, channels: int = 3, drop_path: float | None = None, classes: int | None = None
) -> nn.Module:
    """Builds a network, randomly initialised and without a classifier where it can be left out.

    Args:
        name: a timm name (`"resnet50"`), `"torchvision/NAME"`, or `"path/to/file.py:factory"`, a function
            without required arguments that returns a module. A module is returned as it is.
        channels: image channels.
        drop_path: stochastic depth rate; None for the network's default.
        classes: number of classes of its classifier, which a factory takes as `num_classes`; None for no classifier.

    Raises:
        ValueError: if there is no such network, or it does not take these arguments.
    """
    own = isinstance(name, nn.Module) or ".py:" in name
    if own and drop_path:  # 0 asks for none
        shown = type(name).__name__ if isinstance(name, nn.Module) else name
        raise UserError(f"drop_path is {drop_path:g}, but {shown} is of your own and decides on it; use --drop-path 0")
    if isinstance(name, nn.Module):
        return name
    if own:
        return _from_file(name, channels, classes)
    if name.startswith("timm/"):  # as its authors and the Hugging Face hub call it
        name = name.removeprefix("timm/")
    if name.startswith("torchvision/"):
        return _from_torchvision(name.removeprefix("torchvision/"), channels, drop_path, classes)
    return _from_timm(name, channels, drop_path, classes)


def _from_timm(name: str, channels: int, drop_path: float | None, classes: int | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"timm has no model named {name!r}{hint}")
    options: dict[str, Any] = {"in_chans": channels, "num_classes": classes or 0}
    if drop_path is not None:
        options["drop_path_rate"] = drop_path
    try:
        model: nn.Module = timm.create_model(name, **options)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            if not drop_path:  # 0 asks for no drop path, which this network does not have anyway
                return _from_timm(name, channels, None, classes)
            raise UserError(f"{name} has no drop path; use --drop-path 0") from error
        raise
    return model


def _from_torchvision(name: str, channels: int, drop_path: float | None, classes: int | None) -> nn.Module:
    from torchvision.models import get_model, list_models

    if name not in list_models():
        near = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(f'torchvision/{other}' for other in near)}?" if near else ""
        raise UserError(f"torchvision has no model named {name!r}{hint}")
    if channels != 3:
        raise UserError(f"torchvision's models take 3 channels, not {channels}; use --channels 3 or a timm model")
    options: dict[str, Any] = {} if drop_path is None else {"stochastic_depth_prob": drop_path}
    if classes:
        options["num_classes"] = classes
    try:
        model: nn.Module = get_model(name, weights=None, **options)
    except TypeError as error:
        if drop_path is None:
            raise
        if not drop_path:
            return _from_torchvision(name, channels, None, classes)
        raise UserError(f"torchvision/{name} has no stochastic depth; use --drop-path 0") from error
    return model


def factory_of(name: str) -> Callable[..., Any]:
    """Returns the function that `path/to/file.py:factory` names.

    Raises:
        ValueError: if the file or the function does not exist.
    """
    file, _, factory_name = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{path} does not exist; --model path/to/file.py:factory names a function in a file")
    with _blaming(path):
        module = _module_of(path)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        near = nearest(factory_name, (name for name, value in vars(module).items() if callable(value)))
        hint = f"; did you mean {path}:{near}?" if near else "; --model path/to/file.py:NAME names a function in it"
        raise UserError(f"{path} has no function named {factory_name!r}{hint}")
    return cast(Callable[..., Any], factory)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turns an error of the user's code into a `UserError` that names the line of the user's file."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        own = {str(path), str(path.absolute())}
        line = line_in(own, error)
        if isinstance(error, SyntaxError) and error.filename in own:
            line = error.lineno
        place = path if line is None else f"{path}:{line}"
        why = " ".join(traceback.format_exception_only(error)[-1].split())
        raise UserError(f"{place} fails with {why[:120]}; mend your file") from error


def _module_of(path: Path) -> ModuleType:
    """Imports a file; again only after it has changed.

    The module is entered in `sys.modules`, where dataclasses and timm's `register_model` look for it, under a
    name that hides no other module.
    """
    name = f"{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    written = path.stat().st_mtime_ns
    if name in sys.modules and sys.modules[name].__dict__.get("_written") == written:
        return sys.modules[name]
    module = ModuleType(name)
    module.__dict__.update(_written=written, __file__=str(path))
    sys.modules[name] = module
    try:
        # Not by importlib, which would take the bytecode of a `__pycache__` beside the file: of anybody's making.
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def factory_settings(name: str, channels: int, classes: int | None = None) -> dict[str, int]:
    """Returns the arguments of a factory: `in_chans` if it takes them, `num_classes` if classes are given."""
    arguments = {"in_chans": channels} if "in_chans" in inspect.signature(factory_of(name)).parameters else {}
    return {**arguments, "num_classes": classes} if classes else arguments


def _from_file(name: str, channels: int, classes: int | None) -> nn.Module:
    remember(name)
    factory, settings = factory_of(name), factory_settings(name, channels, classes)
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        passed = listed(list(settings), "and") if settings else "no arguments"
        raise UserError(f"{name} is called with {passed}, and is {error}; give all others defaults") from error
    with _blaming(Path(name.rpartition(":")[0])):
        encoder = factory(**settings)
    if not isinstance(encoder, nn.Module):
        raise UserError(f"{name} returned a {type(encoder).__name__}, not a torch.nn.Module")
    return encoder


def own_module(model: Any) -> Any:
    """Returns a copy of a user's module; names and None as they are."""
    if model is not None and not isinstance(model, (str, nn.Module)):
        raise UserError(f"model is of type {type(model).__name__}; pass a name or a torch.nn.Module")
    return copy.deepcopy(model) if isinstance(model, nn.Module) else model
