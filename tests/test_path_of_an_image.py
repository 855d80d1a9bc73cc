"""How many files of the package an image passes on its way to the loss."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import sparkmim
from sparkmim.data.augmentation import pretrain_transform
from sparkmim.data.dataset import PretrainDataset, collate
from sparkmim.data.source import open_source
from sparkmim.training.modules import OptimizerSettings, PretrainModule

PACKAGE = Path(sparkmim.__file__).parent

BESIDE = {"data/samplers.py", "machine.py", "models/masking.py", "sparse/layout.py"}
"""Files that handle the seed, random generators, the mask and index tables, but no image."""


@pytest.mark.parametrize("network", ["resnet50", "convnext_atto"])
def test_an_image_passes_thirteen_files_at_most(network: str, photos: Path) -> None:
    """From the path of a file to the loss."""
    torch.manual_seed(0)
    model = sparkmim.SparK(network, image_size=64, decoder_width=32)
    source = open_source(str(photos), 3, 2)
    dataset = PretrainDataset(source.items, pretrain_transform((64, 64)), model.grid, mask_ratio=0.6, read=source.read)
    module = PretrainModule(model, OptimizerSettings("adamw", 0.1, (0.9, 0.999), 0, 0, 0, steps=1, warmup=0), seed=0)
    passed: set[str] = set()

    def called(frame: FrameType, event: str, _: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            passed.add(file.relative_to(PACKAGE).as_posix())

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        batch = collate([dataset[0, index] for index in range(2)])
        loss = module.training_step(batch, 0)
    finally:
        sys.setprofile(before)
    assert loss.isfinite()
    assert {"data/decoding.py", "models/spark.py", "sparse/packed.py"} <= passed
    assert len(passed - BESIDE) <= 13, sorted(passed - BESIDE)
