"""Networks from weight files: feature maps are found at most once for each."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes
from timm.models import adapt_input_conv
from torch import nn

from sparkmim.errors import UserError
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import Weights, open_weights, save, write
from sparkmim.models import Hierarchy, SparK, create_classifier, create_encoder
from sparkmim.models.detector import create_detector
from sparkmim.models.segmenter import create_segmenter

COLOURS: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}


def file_of(folder: Path, kind: str, network: str) -> Path:
    """Writes a weight file of a kind, and returns its path."""
    common: dict[str, Any] = {"model": network, "image_size": [16, 16], **COLOURS}
    classes = {"classes": ["cat", "dog"], **common}
    heads = {"norm": "none", "eval_short_side": 16, **classes}
    path = folder / "weights.safetensors"
    if kind == "classifier":
        write(create_classifier(network, 2), path, WeightsMetadata(pooled=True, **classes))
    elif kind == "detector":
        known = {"task": "detection", "category_ids": [1, 2], "masks": False, "box_head": "2fc", "long_side": 32}
        detector = create_detector(create_encoder(network), 2, masks=False, short_side=16, long_side=32, **COLOURS)
        write(detector, path, WeightsMetadata(**heads, **known))
    elif kind == "segmenter":
        known = {"task": "segmentation", "ignore": 255, "reduce_labels": False}
        write(create_segmenter(create_encoder(network), 2), path, WeightsMetadata(**heads, **known))
    else:
        save(SparK(network, image_size=16, decoder_width=16), folder, WeightsMetadata(decoder_width=16, **common))
        path = folder / ("spark.safetensors" if kind == "spark" else "encoder.safetensors")
    return path


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Hierarchy]:
    """Hierarchies made from now on."""
    made: list[Hierarchy] = []
    initialise = Hierarchy.__init__

    def noted(self: Hierarchy, *args: Any, **settings: Any) -> None:
        made.append(self)
        initialise(self, *args, **settings)

    monkeypatch.setattr(Hierarchy, "__init__", noted)
    return made


@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("encoder", Weights.encoder), ("encoder", Weights.encoder_hierarchy), ("classifier", Weights.classifier),
        ("detector", Weights.detector), ("segmenter", Weights.segmenter), ("spark", Weights.spark),
    ],
)  # fmt: skip
def test_one_probe(
    tmp_path: Path, network: str, kind: str, build: Callable[[Weights], nn.Module], request: pytest.FixtureRequest
) -> None:
    weights = open_weights(file_of(tmp_path, kind, network))
    probes = request.getfixturevalue("probes")
    module = build(weights)
    assert len(probes) == 1
    assert not module.training
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in weights.tensors.items()}
    loaded = {name.removeprefix("encoder."): tensor for name, tensor in module.state_dict().items()}
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["encoder", "spark", "classifier", "detector", "segmenter"])
def test_a_hierarchy_that_is_given(tmp_path: Path, network: str, kind: str, request: pytest.FixtureRequest) -> None:
    """Every kind of file starts a network whose feature maps are known already."""
    weights = open_weights(file_of(tmp_path, kind, network))
    classifier = create_classifier(network, 3)
    probes = request.getfixturevalue("probes")
    weights.load_into_encoder(classifier, classifier.hierarchy)
    assert not probes
    encoder = classifier.encoder.state_dict()
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in weights.encoder_tensors.items())


@pytest.mark.parametrize("kind", ["encoder", "spark", "segmenter"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_have_diverged_are_refused(tmp_path: Path, network: str, kind: str, value: float) -> None:
    path = file_of(tmp_path, kind, network)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("body.1.running_var"))
    tensors[name][2] = value
    save_file(tensors, path, header)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} holds NaN or infinite values in {re.escape(name)}; "):
        open_weights(path)


TENSORS = {"weight": torch.zeros(50, 50)}


def by_torch(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
OBJECTS = "holds Python objects, and loading them could run code; save the state_dict"


@pytest.mark.parametrize(
    ("content", "ending", "said"),
    [
        (PAGE, ".pth", "is a web page (a download page?); download the file itself"),
        (PAGE, ".safetensors", "is a web page (a download page?); download the file itself"),
        (b"", ".pth", "is empty; copy or download it again"),
        (b"", ".safetensors", "is empty; copy or download it again"),
        (POINTER, ".pth", "is a Git LFS pointer; fetch the file itself"),
        (POINTER, ".safetensors", "is a Git LFS pointer; fetch the file itself"),
        (to_bytes(TENSORS)[:5000], ".safetensors", f"ends too early (5,000 of {len(to_bytes(TENSORS)):,} bytes); copy"),
        (to_bytes(TENSORS)[:30], ".safetensors", "ends too early (30 of "),
        (by_torch(TENSORS)[:5000], ".pth", "ends too early (after 5,000 bytes)"),
        (by_torch(TENSORS, _use_new_zipfile_serialization=False)[:5000], ".pth", "ends too early (after 5,000 bytes)"),
        (by_torch(nn.Linear(2, 2)), ".pth", OBJECTS),
        (by_torch(nn.Linear(2, 2), _use_new_zipfile_serialization=False), ".pth", OBJECTS),
        (pickle.dumps(TENSORS), ".pth", OBJECTS),
        (bytes(600), ".pth", "is no weight file of PyTorch, or is damaged"),  # an old archive, to torch
        (by_torch(TENSORS), ".safetensors", "is no safetensors file; if PyTorch wrote it, let its name end in .pth"),
        (to_bytes(TENSORS), ".pth", "is a safetensors file; let its name end in .safetensors"),
        (b"\x01", ".pth", "is no weight file of PyTorch, or is damaged"),
        (b"1234", ".safetensors", "is no safetensors file, or is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_weight_file_is_named(content: bytes, ending: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError) as failure:
        open_weights(path)
    message = str(failure.value)
    assert message.startswith(f"{path} {said}")
    assert not {"weights_only", "WeightsUnpickler", "header"} & set(message.split())
    assert len(message.removeprefix(str(path))) < 150


# Files of other tools


@pytest.mark.parametrize("prefix", ["backbone.", "module.", "model.", "_orig_mod.", "model._orig_mod.encoder_q."])
def test_a_prefix_is_removed_and_said(
    tmp_path: Path, network: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = create_encoder(network)
    tensors = {prefix + name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("fc.")}
    torch.save({"state_dict": {**tensors, "head.weight": torch.ones(3)}}, tmp_path / "theirs.pth")
    loaded = open_weights(tmp_path / "theirs.pth").encoder(network)
    assert torch.equal(loaded.state_dict()["body.0.weight"], encoder.state_dict()["body.0.weight"])
    assert caplog.messages == [f"{tmp_path}/theirs.pth names its tensors with {prefix} in front, which is left out"]


def test_a_network_with_parts_of_such_names_loads_as_it_is(
    tmp_path: Path, network: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = nn.Sequential()
    wrapped.add_module("model", create_encoder(network))
    torch.save(wrapped.state_dict(), tmp_path / "mine.pth")
    loaded = open_weights(tmp_path / "mine.pth").encoder(copy.deepcopy(wrapped))
    assert torch.equal(loaded.state_dict()["model.body.0.weight"], wrapped.state_dict()["model.body.0.weight"])
    assert not caplog.messages


def test_what_does_not_fit_is_summed_up(tmp_path: Path, network: str) -> None:
    tensors = create_encoder(network).state_dict()
    del tensors["stem.0.weight"], tensors["stem.0.bias"]
    torch.save({**tensors, "body.0.weight": torch.ones(2, 8, 3, 3), "neck.bias": torch.ones(3)}, tmp_path / "few.pth")
    with pytest.raises(UserError) as refusal:
        open_weights(tmp_path / "few.pth").encoder(network)
    assert str(refusal.value).endswith(
        "few.pth do not fit this model: 2 missing: stem.0.bias, …; 1 without a place in the model: neck.bias; 1 of "
        "another shape: body.0.weight [2, 8, 3, 3] for [16, 8, 3, 3]"
    )


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_colour_weights_for_other_channels(
    tmp_path: Path, network: str, channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As timm adapts them; a grey image gives what it gave as a colour image."""
    weights = open_weights(file_of(tmp_path, "spark", network))
    model = SparK(network, image_size=16, decoder_width=16, channels=channels)
    head = model.decoder.head.weight.clone()
    weights.load_into(model)
    before, after = weights.tensors["encoder.stem.0.weight"], model.encoder.stem[0].weight
    assert torch.equal(after, adapt_input_conv(channels, before))
    assert torch.equal(model.decoder.head.weight, head)
    assert torch.equal(model.decoder.blocks[0].conv1.weight, weights.tensors["decoder.blocks.0.conv1.weight"])
    assert f"stem.0.weight, of 3 channels, is adapted to {channels}" in caplog.text
    classifier = create_classifier(network, 2, channels)
    weights.load_into_encoder(classifier, channels=channels)
    assert torch.equal(classifier.encoder.stem[0].weight, after)
