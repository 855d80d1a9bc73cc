"""Files of ConvNeXt V2's release are read: the encoder alone, and the masked autoencoder of its pretraining."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from sparkmim.errors import UserError
from sparkmim.interop.names import convnext_name
from sparkmim.interop.weights import load, open_weights
from sparkmim.models import SparK

_PARTS = {
    "conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2", "mlp.grn.weight": "grn.gamma",
    "mlp.grn.bias": "grn.beta",
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SparK:
    torch.manual_seed(0)
    model = SparK(timm.create_model("convnextv2_atto", num_classes=0), 64, decoder="fcmae", decoder_width=24).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def linear(name: str) -> bool:
    return "pwconv" in name and name.endswith("weight")


def published(encoder: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `convnextv2_atto_1k_224_fcmae.pt`: without what pretraining does not reach, GRN with four axes."""
    named = {convnext_name(name, _PARTS): tensor for name, tensor in encoder.items() if not name.startswith("head.")}
    return {
        name: tensor.view(1, 1, 1, -1) if ".grn." in name else tensor.view(tensor.shape[:2]) if linear(name) else tensor
        for name, tensor in named.items()
    }


def in_minkowski(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """As MinkowskiEngine's layers store it; the stem is an ordinary convolution."""
    if "downsample_layers.0" in name:
        return name, tensor
    if "dwconv" in name or re.search(r"downsample_layers.\d.1", name):
        if name.endswith("bias"):
            return name, tensor[None]
        points = tensor.transpose(2, 3).flatten(2)  # [out, in, k²]
        depthwise = "dwconv" in name
        return name.replace("weight", "kernel"), points[:, 0].t() if depthwise else points.permute(2, 1, 0)
    if ".grn." in name:
        return name, tensor.view(1, -1)
    kind = "linear" if "pwconv" in name else "ln"
    return re.sub(r"\.(\w+)$", rf".{kind}.\1", name), tensor


def checkpoint(model: SparK) -> dict[str, Tensor]:
    """As the release's pretraining writes it."""
    encoder = published(model.encoder.state_dict())
    found = dict(in_minkowski(f"encoder.{name}", tensor) for name, tensor in encoder.items())
    theirs = {
        "project": "proj", "block.depthwise": "decoder.0.dwconv", "block.norm": "decoder.0.norm",
        "block.expand": "decoder.0.pwconv1", "block.response.weight": "decoder.0.grn.gamma",
        "block.response.bias": "decoder.0.grn.beta", "block.reduce": "decoder.0.pwconv2",
    }  # fmt: skip
    for name, tensor in model.decoder.state_dict().items():
        if name.startswith("head."):  # [channel, row, column] there, [row, column, channel] here
            pixels = tensor.unflatten(0, (3, 32, 32)).movedim(0, 2).flatten(0, 2)
            found[name.replace("head", "pred")] = pixels
            continue
        renamed = next((name.replace(ours, other) for ours, other in theirs.items() if name.startswith(ours)), name)
        found[renamed] = tensor.view(1, 1, 1, -1) if ".grn." in renamed else tensor
    return found


def test_the_published_encoder_is_recognised_and_loaded(model: SparK, tmp_path: Path) -> None:
    file = tmp_path / "convnextv2_atto_1k_224_fcmae.pt"
    torch.save({"model": published(model.encoder.state_dict())}, file)
    weights = open_weights(file)
    assert weights.kind == "encoder"
    assert weights.model == "convnextv2_atto"
    images = torch.rand(1, 3, 64, 64)
    expected: Any = model.encoder
    found: Any = weights.encoder()
    assert torch.equal(found.forward_features(images), expected.forward_features(images))


def test_a_checkpoint_with_the_decoder_rebuilds_as_the_model_does(model: SparK, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-799.pth"
    torch.save({"model": checkpoint(model)}, file)
    weights = open_weights(file)
    assert weights.kind == "pretrained"
    known = weights.metadata
    assert (known.model, known.decoder, known.decoder_width, known.patch_size) == ("convnextv2_atto", "fcmae", 24, 32)
    images = torch.rand(2, 3, 64, 64)
    visible = torch.tensor([[[True, False], [False, True]]] * 2)
    loaded = weights.spark(image_size=(64, 64))
    assert torch.equal(loaded(images, visible).prediction, model(images, visible).prediction)


def test_a_deeper_decoder_is_refused_by_name(model: SparK, tmp_path: Path) -> None:
    file = tmp_path / "deep.pth"
    torch.save({**checkpoint(model), "decoder.1.dwconv.bias": torch.zeros(24)}, file)
    with pytest.raises(UserError, match=r"without a place in the model: decoder.decoder.1.dwconv.bias"):
        load(file)
