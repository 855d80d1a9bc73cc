"""Weights of small networks, for pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparkmim
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.models import create_classifier, create_encoder

KNOWN = {"image_size": [16, 16], "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "crop": 1.0}

Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes a module's weights with metadata, for RGB images of 16×16 unless said otherwise."""

    def write(module: nn.Module, name: str, **metadata: Any) -> Path:
        path = tmp_path / f"{name}.safetensors"
        weights.write(module, path, WeightsMetadata(**{**KNOWN, **metadata}))
        return path

    return write


@pytest.fixture
def encoder_file(written: Written, network: str) -> str:
    """Random weights of the network with maps at strides 2 and 4."""
    torch.manual_seed(0)
    return str(written(create_encoder(network), "encoder", model=network))


@pytest.fixture
def classifier_file(written: Written, network: str) -> Path:
    """Random weights of a classifier on the network, made as those of `encoder_file`."""
    torch.manual_seed(0)
    classifier = create_classifier(network, 4, image_size=[16, 16])
    return written(classifier, "classifier", model=network, classes=list("abcd"), pooled=True)


@pytest.fixture
def grey_file(written: Written, network: str) -> Path:
    """Random weights of the network for grey images, without known statistics."""
    return written(create_encoder(network, 1), "grey", model=network, channels=1, mean=None, std=None)


@pytest.fixture
def volumes(written: Written) -> dict[str, Any]:
    """Arguments for weights of a network for volumes, and the network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv3d(4, 6, 3, stride=2, padding=1))
    file = written(network, "volumes", image_size=[8, 8, 12], channels=1, mean=None, std=None)
    return {"weights": file, "model": network}


@pytest.fixture
def unusable(written: Written, network: str) -> list[tuple[dict[str, Any], str]]:
    """Arguments for weights that give no pictures, and what is said of them."""
    signals = nn.Sequential(nn.Conv1d(2, 4, 5, stride=2, padding=2))
    diverged = create_encoder(network)
    with torch.no_grad():
        next(diverged.parameters()).sign_().mul_(3e38)
    return [
        ({"weights": written(signals, "signals", image_size=[64], channels=2, mean=None, std=None), "model": signals},
         "signals, which are no pictures; `sparkmim embed` writes features"),
        ({"weights": written(diverged, "diverged", model=network)},
         r"stage \d of .*diverged.safetensors gives values that are not finite"),
    ]  # fmt: skip


@pytest.fixture
def pretrained(tmp_path: Path, network: str) -> Callable[..., Path]:
    """Writes the weights of a run folder, of a random model for images of 32×48 with patches of 8 unless said
    otherwise."""

    def write(
        name: str, network: Any = network, size: Sequence[int] = (32, 48), patch: int = 8, channels: int = 3,
        seed: int = 0, **metadata: Any,
    ) -> Path:  # fmt: skip
        torch.manual_seed(seed)
        built: dict[str, Any] = {"image_size": list(size), "patch_size": patch, "decoder_width": 16}
        model = sparkmim.SparK(network, channels=channels, **built)
        known = {"model": network if isinstance(network, str) else None, "channels": channels,
                 "mean": [0.4] * channels, "std": [0.2] * channels}  # fmt: skip
        weights.save(model, tmp_path / name / "weights", WeightsMetadata(**{**built, **known, **metadata}))
        return tmp_path / name

    return write


@pytest.fixture
def assert_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks that a command fails with a message and writes nothing."""
    monkeypatch.chdir(tmp_path)

    def refused(command: Callable[..., Any], message: str, **arguments: Any) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            command(**arguments)
        assert sorted(tmp_path.rglob("*")) == before

    return refused
