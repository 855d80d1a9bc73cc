"""Weight files: safetensors with the metadata needed to rebuild the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import sparkmim
from sparkmim.interop import official
from sparkmim.models import SparK

ENCODER_FILE = "encoder.safetensors"
MODEL_FILE = "spark.safetensors"


def save(model: SparK, folder: Path, metadata: dict[str, Any], suffix: str = "") -> None:
    """Writes the encoder alone, under its own names, and the whole model.

    `encoder.safetensors` loads strictly into the network it came from (`timm.create_model(name, num_classes=0)`);
    `spark.safetensors` into `SparK`. Both carry `metadata` as JSON under the key `sparkmim`.

    Args:
        model: the model.
        folder: made if it does not exist.
        metadata: what is needed to build the model again.
        suffix: put before the file ending, `_ema` for averaged weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", "sparkmim": json.dumps({"version": sparkmim.__version__, **metadata})}
    for file, module in ((ENCODER_FILE, model.encoder), (MODEL_FILE, model)):
        path = folder / file.replace(".safetensors", f"{suffix}.safetensors")
        partial = path.with_suffix(".partial")
        partial.write_bytes(to_bytes(_tensors(module), header))  # safetensors' own files are for their owner alone
        partial.replace(path)  # a kill in the middle leaves the old file whole


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A state dict that safetensors takes: contiguous, and no two entries sharing memory."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in module.state_dict().items()}  # fmt: skip


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the weights of a run folder, one of our weight files, or an original SparK file.

    Returns:
        The tensors, and our metadata (empty for foreign files). Code in the file is never run.

    Raises:
        ValueError: if there is nothing to read there.
    """
    path = Path(path)
    if path.is_dir():
        found = path / "weights" / MODEL_FILE
        if not found.is_file():
            raise ValueError(f"{path} is a folder without weights/{MODEL_FILE}; name a run folder or a weight file")
        path = found
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a run folder or a weight file")
    if path.suffix != ".safetensors":
        return official.read(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("sparkmim", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def load_into(model: SparK, path: str | Path) -> None:
    """Loads weights into a model: all of it, or its encoder if the file holds no more.

    Raises:
        ValueError: if they do not fit.
    """
    tensors, _ = read(path)
    if any(name.startswith("sparse_encoder.") for name in tensors):
        official.load_into(model, tensors)
        return
    whole = any(name.startswith("decoder.") for name in tensors)
    target: nn.Module = model if whole else model.encoder
    try:
        target.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        detail = " ".join(line.strip() for line in lines[1:3])[:300]
        raise ValueError(f"the weights in {path} do not fit this model: {detail}") from error


def load(path: str | Path) -> SparK:
    """Builds the model that a run folder or weight file holds, in evaluation mode.

    Raises:
        ValueError: if the file does not say how to build it; use `load_into` with a model of yours then.
    """
    _, metadata = read(path)
    if not metadata.get("model"):
        raise ValueError(f"{path} does not name its network; build a SparK model and load the weights into it")
    model = SparK(
        metadata["model"],
        image_size=metadata["image_size"],
        mask_ratio=metadata["mask_ratio"],
        patch_size=metadata["patch_size"],
        decoder_width=metadata["decoder_width"],
        channels=metadata["channels"],
        decoder=metadata.get("decoder", "spark"),
        stages=metadata.get("stages"),
        feature_modules=metadata.get("feature_modules"),
    )
    load_into(model, path)
    return model.eval()
