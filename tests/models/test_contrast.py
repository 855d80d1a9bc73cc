"""The contrastive loss, against its formula, and what it asks of the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparkmim
from sparkmim.data.augmentation import pretrain_transform
from sparkmim.data.dataset import PretrainDataset
from sparkmim.models.contrast import TEMPERATURE, Contrast
from sparkmim.runs.history import read_history


def formula(projected: torch.Tensor) -> float:
    """SimCLR, equation 1, one view after the other."""
    rows = [row / row.norm() for row in projected]
    total = 0.0
    for i, row in enumerate(rows):
        partner = i + 1 if i % 2 == 0 else i - 1
        others = [math.exp(float(row @ other) / TEMPERATURE) for j, other in enumerate(rows) if j != i]
        total -= math.log(math.exp(float(row @ rows[partner]) / TEMPERATURE) / sum(others))
    return total / len(rows)


@given(images=st.integers(1, 6), seed=st.integers(0, 9))
def test_is_the_formula(images: int, seed: int) -> None:
    torch.manual_seed(seed)
    contrast = Contrast(6).double()
    features = torch.randn(2 * images, 6, dtype=torch.float64)
    contrast.eval()  # else a batch of two is normalised to opposite signs
    assert contrast(features).item() == pytest.approx(formula(contrast.project(features).detach()), abs=1e-9)


def test_views_of_one_image_attract_and_others_repel() -> None:
    contrast: Any = Contrast(4).eval()
    contrast.project = torch.nn.Identity()
    far = torch.eye(4).repeat_interleave(2, 0)  # each image the same twice, and unlike all others
    near = torch.eye(4).repeat(2, 1)  # views in a row differ
    assert contrast(far) < 0.1 < contrast(near)


def test_views_have_masks_and_crops_of_their_own() -> None:
    torch.manual_seed(0)
    pictures: Any = [torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8)]
    data = PretrainDataset(pictures, pretrain_transform((32, 32)), (4, 4), 0.5)
    first, second, again = data[3, 0, 0], data[3, 0, 1], data[3, 0, 1]
    assert not torch.equal(first["visible"], second["visible"])
    assert not torch.equal(first["image"], second["image"])
    assert torch.equal(again["visible"], second["visible"])
    assert torch.equal(again["image"], second["image"])


def test_a_run_with_contrast(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    """It learns both, shows the reconstruction's loss as such, and leaves plain weights."""
    run = tmp_path / "run"
    # Without jitter, for colours are what these pictures differ by.
    settings = {**small_pretraining, "epochs": 30, "recipe": "contrast", "mask_ratio": 0.5, "jitter": 0.0}
    settings["learning_rate"] = 0.05
    result = sparkmim.pretrain(**settings, out=run, log_every=1)
    steps = [event.fields for event in read_history(run / "history.jsonl") if event.kind == "step"]
    losses, contrasts = ([step[name] for step in steps] for name in ("loss", "contrast"))
    assert len(steps) == 90
    assert losses[0] == pytest.approx(1.0, abs=0.1)
    assert sum(contrasts[-9:]) < 0.9 * sum(contrasts[:9])
    assert sum(losses[-9:]) < sum(losses[:9])
    assert not any(name.startswith("contrast") for name in result.model.state_dict())
    assert "Contrastive loss" in (run / "report.html").read_text()
    sparkmim.load(run)


def test_a_stopped_run_with_contrast_goes_on_as_if_it_had_not_stopped(
    small_pretraining: dict[str, Any], tmp_path: Path
) -> None:
    import lightning.pytorch as pl

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 5

    settings = {**small_pretraining, "recipe": "contrast"}
    whole = sparkmim.pretrain(**settings, out=tmp_path / "whole")
    assert not sparkmim.pretrain(**settings, out=tmp_path / "parts", callbacks=[Stop()]).finished
    parts = sparkmim.pretrain(out=tmp_path / "parts", resume=True)
    assert parts.finished
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name


def test_a_batch_without_room_for_two_views(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    message = "batch_size 3 does not divide into 1 process × 1 accumulation step × 2 views; use 2"
    with pytest.raises(ValueError, match=message):
        sparkmim.pretrain(**{**small_pretraining, "batch_size": 3}, out=tmp_path / "run", contrast=1.0)
    assert not (tmp_path / "run").exists()


def test_a_recipes_batch_shrinks_to_an_even_number(small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    """Grey images: jitter works on those too."""
    del small_pretraining["batch_size"], small_pretraining["data"]
    odd = [torch.randint(0, 256, (1, 40, 40), dtype=torch.uint8) for _ in range(7)]
    settings = {**small_pretraining, "channels": 1, "epochs": 1, "warmup_epochs": 0, "recipe": "contrast"}
    assert sparkmim.pretrain(**settings, data=odd, out=tmp_path / "run").finished
    start = read_history(tmp_path / "run" / "history.jsonl")[0]
    assert start.fields["settings"]["batch_size"] == 6


def test_arrays_have_no_colours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jitter is 0.5, but arrays have no colours; use --jitter 0"):
        sparkmim.pretrain(
            data=[torch.rand(5, 64, 64) for _ in range(8)], model="resnet10t", out=tmp_path / "run", channels=5,
            image_size=64, patch_size=32, recipe="contrast",
        )  # fmt: skip
