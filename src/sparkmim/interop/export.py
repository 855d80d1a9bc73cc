"""Export of weights to other software."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.files import opened_for_torch, replacing
from sparkmim.interop import graphs
from sparkmim.interop.detectron2 import detectron2_file
from sparkmim.interop.exportable import ExportableNetwork, open_exportable
from sparkmim.interop.hub import push_folder, write_folder
from sparkmim.interop.official_export import original_file
from sparkmim.interop.openmmlab import openmmlab_checkpoint
from sparkmim.interop.torchvision import torchvision_tensors
from sparkmim.results import ExportResult


def export_weights(
    *,
    weights: str | Path,
    format: str,
    out: str | Path,
    model: str | nn.Module | None = None,
    image_size: int | Sequence[int] | None = None,
    push: str | None = None,
    private: bool = False,
) -> ExportResult:
    """Runs `sparkmim.export`, which documents arguments, result and errors."""
    path = Path(out)
    _check(format, image_size, push)
    network = open_exportable(weights, model)
    if format in ("timm", "torchvision", "huggingface"):
        network = network.without_pooled_head()
    result = ExportResult(path, format, network.label, own_names=network.is_custom)
    if format == "huggingface":
        result.tensors = write_folder(network, path)
        if push:
            result.address = push_folder(path, push, private)
        return result
    with replacing(path) as partial:
        if format in ("onnx", "torch-export"):
            write = graphs.write_onnx if format == "onnx" else graphs.write_torch_export
            result.difference = write(network, partial, image_size)
        elif format == "detectron2":
            content, result.tensors = detectron2_file(network)
            partial.write_bytes(content)
        else:
            entries = _entries(network, format)
            tensors = entries.get("module", entries.get("state_dict", entries)).values()
            result.tensors = sum(isinstance(value, Tensor) for value in tensors)
            if path.suffix == ".safetensors":
                partial.write_bytes(to_bytes(entries, {"format": "pt"}))
            else:
                with opened_for_torch(partial) as file:
                    torch.save(entries, file)
    return result


def _entries(network: ExportableNetwork, format: str) -> dict[str, Any]:
    """Returns the content of a PyTorch or safetensors file."""
    if format == "timm":
        return dict(network.timm_tensors()[1])
    if format == "torchvision":
        return dict(torchvision_tensors(network))
    if format == "spark":
        return original_file(network)
    return openmmlab_checkpoint(network, detection=format == "mmdet")


def _check(format: str, image_size: int | Sequence[int] | None, push: str | None) -> None:
    """Checks that the arguments go together, before anything is read or written."""
    if push and format != "huggingface":
        raise UserError(f"push uploads a folder of the format huggingface, not a {format} file; use that format")
    if image_size is not None and format not in ("onnx", "torch-export"):
        raise UserError(f"image_size is for onnx and torch-export; a {format} file has none, so leave it out")
