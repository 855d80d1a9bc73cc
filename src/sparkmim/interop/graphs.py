"""Programs that compute a network without its Python code: ONNX, and `torch.export`'s."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.interop.exportable import ExportableNetwork
from sparkmim.models import Hierarchy
from sparkmim.models.classifier import PooledClassifier
from sparkmim.models.hierarchy import rank_of

TOLERANCE = 1e-4
"""Largest difference to PyTorch, of values up to 1 in size, or in proportion to the largest."""

_LARGEST = 2**31 - 2**20
"""Bytes of weights that a single ONNX file can hold, beside the program."""


class FeatureMaps(nn.Module):
    """Images `[B, C, *S]` to feature maps `[B, C_i, *(S / s_i)]`, shallow to deep, as a tuple."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        super().__init__()
        self.hierarchy = hierarchy

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        names = self.hierarchy._names
        if names is None:
            return tuple(self.hierarchy(images))
        # A hierarchy of named modules stops the network at the last of them, which a tracer does not survive. Here the
        # network runs to its end; what no output depends on is left out of the program.
        encoder, maps = self.hierarchy.encoder, {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                maps[name] = output

            return hook

        handles = [encoder.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        try:
            encoder(images)
        finally:
            for handle in handles:
                handle.remove()
        return tuple(maps[name] for name in names)


class Logits(nn.Module):
    """A `PooledClassifier`, by way of `FeatureMaps`: images `[B, C, *S]` to logits `[B, classes]`."""

    def __init__(self, classifier: PooledClassifier) -> None:
        super().__init__()
        self.maps, self.head = FeatureMaps(classifier.hierarchy), classifier.head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.maps(images)[-1].flatten(2).mean(-1))
        return logits


def write_onnx(network: ExportableNetwork, path: Path, image_size: int | Sequence[int] | None) -> float | None:
    """Writes an ONNX file, and compares it with PyTorch if onnxruntime is installed.

    The input `images` `[batch, C, *S]` may have any batch. Of a classifier, the output is `logits` `[batch, classes]`;
    of an encoder, one per feature map, `stride4` and so on. The metadata hold image size, mean, std and classes.

    Returns:
        The largest difference, or None if it was not looked for.

    Raises:
        ValueError: if a package is missing, the network cannot be written so, or differs.
    """
    if sum(tensor.nbytes for tensor in network.module.state_dict().values()) > _LARGEST:
        raise UserError(f"{network.called()} is larger than an ONNX file can be, 2 GB; export it as torch-export")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"onnx needs the package {missing[0]}; install it with: pip install 'sparkmim[onnx]'")
    program, names, size = _program_of(network, image_size)
    exported = _exported(network, program, size)
    model = torch.onnx.export(exported, dynamo=True, input_names=["images"], output_names=names, verbose=False)
    assert model is not None  # with dynamo=True
    model.model.metadata_props.update(_metadata(network, size))
    model.save(path, external_data=False)
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = _images(network, size, 3)
    found = [torch.from_numpy(output) for output in session.run(names, {"images": images.numpy()})]
    return _difference(network, "onnx", program, images, found)


def write_torch_export(network: ExportableNetwork, path: Path, image_size: int | Sequence[int] | None) -> float:
    """Writes a `torch.export` program, and compares what it computes when read again with the network.

    Input and outputs as of ONNX: logits, or a tuple of feature maps.

    Returns:
        The largest difference.

    Raises:
        ValueError: if the network cannot be traced, or differs.
    """
    program, _, size = _program_of(network, image_size)
    exported = _exported(network, program, size)
    torch.export.save(exported, path, extra_files={"sparkmim.json": json.dumps(_metadata(network, size))})
    module = torch.export.load(path).module()
    images = _images(network, size, 3)
    with torch.no_grad():
        outputs = module(images)
    found = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return _difference(network, "torch-export", program, images, found)


def _program_of(
    network: ExportableNetwork, image_size: int | Sequence[int] | None
) -> tuple[nn.Module, list[str], tuple[int, ...]]:
    """What to write, the names of its outputs, and the size of its images."""
    known = network.weights.metadata
    size = image_size if image_size is not None else known.get("image_size") or 224
    size = (size,) * rank_of(network.module) if isinstance(size, int) else tuple(size)
    if network.classes:
        module = network.module
        return Logits(module).eval() if isinstance(module, PooledClassifier) else module, ["logits"], size
    hierarchy = Hierarchy(
        network.module, network.weights.channels, len(size), size, known.get("stages"), known.get("feature_modules")
    )
    if any(extent % hierarchy.stride for extent in size):
        shown = "×".join(map(str, size))
        raise UserError(f"image_size {shown} is not a multiple of the network's stride, {hierarchy.stride}; use one")
    return FeatureMaps(hierarchy).eval(), [f"stride{stride}" for stride in hierarchy.strides], size


def _exported(network: ExportableNetwork, program: nn.Module, size: Sequence[int]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=65535)
    try:
        with torch.no_grad():
            return torch.export.export(
                program, (_images(network, size, 2),), dynamic_shapes=({0: batch},), strict=False
            )
    except Exception as error:  # torch has many kinds, for what it cannot trace
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"torch.export cannot trace {network.called()} at {'×'.join(map(str, size))}: {reason}; give another "
            "image_size, or export its weights as timm"
        ) from error


def _difference(
    network: ExportableNetwork, format: str, program: nn.Module, images: Tensor, found: Sequence[Tensor]
) -> float:
    with torch.no_grad():
        outputs = program(images)
    expected = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        difference = (one - other).abs().max().item()
        worst = max(worst, difference)
        if not difference <= TOLERANCE * max(1.0, one.abs().max().item()):  # not: NaN is no agreement
            raise UserError(
                f"{network.called()} as {format} differs from PyTorch by {difference:.1e}; export its weights as timm"
            )
    return worst


def _images(network: ExportableNetwork, size: Sequence[int], batch: int) -> Tensor:
    return torch.randn(batch, network.weights.channels, *size, generator=torch.Generator().manual_seed(batch))


def _metadata(network: ExportableNetwork, size: Sequence[int]) -> dict[str, str]:
    known = network.weights.metadata
    said: dict[str, Any] = {"model": network.name, "image_size": list(size), "mean": known.get("mean"),
                            "std": known.get("std"), "classes": network.classes}  # fmt: skip
    return {f"sparkmim.{key}": json.dumps(value) for key, value in said.items() if value}
