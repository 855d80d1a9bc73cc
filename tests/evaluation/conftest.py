"""Images that a network can tell apart, and weight files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.models import create_classifier, create_encoder

CLASSES = ["blue", "green", "red"]
KNOWN = {"image_size": [16, 16], "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of train/ (12 of each class) and val/ (4), PNG files of noise with one bright channel."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "labelled"
    for part, count in (("train", 12), ("val", 4)):
        for place, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (20, 20, 3))
                pixels[..., 2 - place] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number:02}.png")
    return folder


@pytest.fixture
def run(tmp_path: Path, network: str) -> Path:
    """A run folder with a classifier of the three classes, on the network of total stride 4."""
    torch.manual_seed(1)
    classifier = create_classifier(network, 3, image_size=[16, 16])
    file = tmp_path / "run" / "weights" / "classifier_best.safetensors"
    weights.write(
        classifier, file, WeightsMetadata(model=network, classes=CLASSES, pooled=True, figures={"top1": 0.5}, **KNOWN)
    )
    return tmp_path / "run"


@pytest.fixture
def encoder_file(tmp_path: Path, network: str) -> Path:
    """Weights of that network alone, others than the run's."""
    torch.manual_seed(2)
    file = tmp_path / "other.safetensors"
    weights.write(create_encoder(network), file, WeightsMetadata(model=network, **KNOWN))
    return file
