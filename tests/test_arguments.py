"""Ranges of arguments: one table for all commands, checked before any work."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparkmim
from sparkmim.arguments import CHECKS, Range, check_arguments
from sparkmim.cli import COMMANDS, main

NO_RANGE = {
    "accelerator", "accept_changed_data", "annotations", "augment", "box_head", "callbacks", "channels_last",
    "checkpoint_gradients", "classes", "compare", "compile", "data", "decoder", "errors", "eval_only",
    "feature_modules", "fit_head", "format", "freeze", "host", "images", "init_weights", "keep_best", "labels",
    "loggers", "loss", "mask", "model", "norm", "out", "overwrite", "pooled", "predict", "private", "probe", "push",
    "query", "recipe", "reduce_labels", "resume", "run", "topic", "val_annotations", "val_data", "val_images",
    "val_labels", "visible", "weights",
}  # fmt: skip
"""Paths, objects, switches, and words whose types list the choices."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command: str) -> None:
    names = set(inspect.signature(COMMANDS[command]).parameters)
    missing = {name for name in names - NO_RANGE if name not in CHECKS and f"{command}.{name}" not in CHECKS}
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_in_range(command: str) -> None:
    parameters = inspect.signature(COMMANDS[command]).parameters
    check_arguments(
        command, {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    )


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        ("pretrain", "weight_decay", -0.1),
        ("pretrain", "warmup_epochs", -1),
        ("detect", "drop_factor", -1.0),
        ("detect", "drop_factor", 2.0),
        ("detect", "drops", [0.9, 0.1]),
        ("detect", "drops", [0.5, 0.5]),
        ("detect", "warmup_start", 5),
        ("pretrain", "max_unreadable", 2),
        ("pretrain", "max_unreadable", -1),
        ("pretrain", "picture_every", -1),
        ("segment", "ignore", -7),
        ("pretrain", "beta1", 1.5),
        ("pretrain", "beta2", 1.0),
        ("finetune", "devices", 0),
        ("finetune", "devices", "0"),
        ("finetune", "num_nodes", 0),
        ("segment", "workers", -1),
        ("pretrain", "image_size", 0),
        ("pretrain", "image_size", [32, 0]),
        ("pretrain", "image_size", [32, 32, 32, 32]),
        ("pretrain", "precision", "16-mixed"),
        ("pretrain", "seed", 2**70),
        ("pretrain", "seed", -1),
        ("pretrain", "accelerator", "tpu"),
        ("evaluate", "shots", []),
        ("evaluate", "temperature", 0.0),
        ("playground", "port", 99999),
        ("pretrain", "epochs", math.nan),
        ("pretrain", "epochs", math.inf),
        ("pretrain", "learning_rate", math.nan),
        ("pretrain", "mean", [math.nan, 0.5, 0.5]),
        ("pretrain", "std", [0.0, 0.5, 0.5]),
        ("pretrain", "batch_size", 2.5),
        ("pretrain", "batch_size", True),
        ("reconstruct", "masks", 0),
    ],
)
def test_what_is_out_of_range_is_one_sentence(command: str, name: str, value: Any) -> None:
    with pytest.raises(sparkmim.UserError, match=rf"^{name} is .*; ") as refusal:
        check_arguments(command, {name: value})
    assert "\n" not in str(refusal.value)


@given(
    st.floats() | st.integers(), st.floats(-1e6, 1e6), st.floats(0, 1e6), st.booleans(), st.booleans(), st.booleans()
)
def test_a_range_contains_what_it_says(
    value: float, low: float, size: float, above: bool, below: bool, whole: bool
) -> None:
    high = low + size
    inside = (low < value if above else low <= value) and (value < high if below else value <= high)
    inside = inside and math.isfinite(value) and (not whole or value == int(value))
    assert (Range(low, high, above=above, below=below, whole=whole)(value) is None) == inside


def test_a_command_checks_before_it_looks_at_anything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "--data", "nowhere", "--out", "run", "--beta1", "1.5"])
    assert capsys.readouterr().err == "sparkmim pretrain: --beta1 is 1.5; it must be 0 or more and below 1\n"


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch, photos: Any, tmp_path: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="accelerator is cuda, but PyTorch finds no GPU here; use --accelerator cpu"):
        sparkmim.pretrain(data=str(photos), out=tmp_path / "run", accelerator="cuda")
    assert not (tmp_path / "run").exists()
