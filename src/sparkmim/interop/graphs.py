"""Export of programs that compute a network without its Python code: ONNX and `torch.export`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.files import opened_for_torch
from sparkmim.interop.exportable import ExportableNetwork
from sparkmim.models import Hierarchy
from sparkmim.models.classifier import PooledClassifier
from sparkmim.models.hierarchy import rank_of

TOLERANCE = 1e-4
"""Maximum absolute difference to PyTorch, relative to the largest output where that exceeds 1."""

_LARGEST = 2**31 - 2**20
"""Maximum bytes of weights in a single ONNX file, with room for the program."""


class FeatureMaps(nn.Module):
    """A network from images `[B, C, *S]` to a tuple of feature maps `[B, C_i, *(S / s_i)]`, shallow to deep."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        super().__init__()
        self.hierarchy = hierarchy

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        names = self.hierarchy._names
        if names is None:
            return tuple(self.hierarchy(images))
        # The hierarchy stops the network after the last map by an exception, which cannot be traced. Here the network
        # runs to its end, and export leaves out what no output depends on.
        encoder, maps = self.hierarchy.encoder, {}

        def keep(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
            maps[name] = output

        handles = [encoder.get_submodule(name).register_forward_hook(partial(keep, name)) for name in names]
        try:
            encoder(images)
        finally:
            for handle in handles:
                handle.remove()
        return tuple(maps[name] for name in names)


class Logits(nn.Module):
    """A `PooledClassifier` that can be traced: images `[B, C, *S]` to logits `[B, classes]`."""

    def __init__(self, classifier: PooledClassifier) -> None:
        super().__init__()
        self.maps, self.head = FeatureMaps(classifier.hierarchy), classifier.head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.maps(images)[-1].flatten(2).mean(-1))
        return logits


def write_onnx(network: ExportableNetwork, path: Path, image_size: int | Sequence[int] | None) -> float | None:
    """Writes an ONNX file, and compares its outputs with PyTorch's if onnxruntime is installed.

    The input is `images` `[batch, C, *S]`, of any batch size. A classifier's output is `logits` `[batch, classes]`; an
    encoder has one output per feature map, `stride4` and so on. The metadata hold image size, mean, std and classes.
    Returns the largest difference, or None if not compared.
    """
    if sum(tensor.nbytes for tensor in network.module.state_dict().values()) > _LARGEST:
        raise UserError(f"{network.label} is larger than an ONNX file can be, 2 GB; export it as torch-export")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"onnx needs the package {missing[0]}; install it with: pip install 'sparkmim[onnx]'")
    program, names, size = _traceable(network, image_size)
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
    """Writes a `torch.export` program, reads it again, and compares its outputs with the network's.

    It maps images to logits, or to a tuple of feature maps. Returns the largest difference.
    """
    program, _, size = _traceable(network, image_size)
    exported = _exported(network, program, size)
    with opened_for_torch(path) as file:
        torch.export.save(exported, file, extra_files={"sparkmim.json": json.dumps(_metadata(network, size))})
    images = _images(network, size, 3)
    return _difference(network, "torch-export", program, images, _outputs(torch.export.load(path).module(), images))


def _traceable(
    network: ExportableNetwork, image_size: int | Sequence[int] | None
) -> tuple[nn.Module, list[str], tuple[int, ...]]:
    """Returns the module to export, the names of its outputs, and the image size."""
    known = network.weights.metadata
    size = image_size if image_size is not None else known.image_size or 224
    size = (size,) * rank_of(network.module) if isinstance(size, int) else tuple(size)
    if network.classes:
        module = network.module
        return Logits(module).eval() if isinstance(module, PooledClassifier) else module, ["logits"], size
    hierarchy = Hierarchy(network.module, known.channels, len(size), size, known.stages, known.feature_modules)
    if any(extent % hierarchy.stride for extent in size):
        shown = "×".join(map(str, size))
        raise UserError(f"image_size {shown} is not a multiple of the network's stride, {hierarchy.stride}; use one")
    return FeatureMaps(hierarchy).eval(), [f"stride{stride}" for stride in hierarchy.strides], size


def _exported(network: ExportableNetwork, program: nn.Module, size: Sequence[int]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=65535)
    images = _images(network, size, 2)
    try:
        with torch.no_grad():
            return torch.export.export(program, (images,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:  # torch raises many kinds
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"torch.export cannot trace {network.label} at {'×'.join(map(str, size))}: {first_line}; give "
            "another image_size, or export its weights as timm"
        ) from error


def _difference(
    network: ExportableNetwork, format: str, program: nn.Module, images: Tensor, found: Sequence[Tensor]
) -> float:
    worst = 0.0
    for one, other in zip(_outputs(program, images), found, strict=True):
        difference = (one - other).abs().max().item()
        worst = max(worst, difference)
        if not difference <= TOLERANCE * max(1.0, one.abs().max().item()):  # NaN must fail too
            raise UserError(
                f"{network.label} as {format} differs from PyTorch by {difference:.1e}; export its weights as timm"
            )
    return worst


def _outputs(program: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = program(images)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _images(network: ExportableNetwork, size: Sequence[int], batch: int) -> Tensor:
    return torch.randn(batch, network.weights.channels, *size, generator=torch.Generator().manual_seed(batch))


def _metadata(network: ExportableNetwork, size: Sequence[int]) -> dict[str, str]:
    known = network.weights.metadata
    values = {"model": network.name, "image_size": list(size), **known.given("mean", "std"), "classes": network.classes}
    return {f"sparkmim.{key}": json.dumps(value) for key, value in values.items() if value}
