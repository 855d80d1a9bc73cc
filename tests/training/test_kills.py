"""Runs that are killed, at seeded moments, end up as those that are not; of two that start at once, one goes on.

`pytest tests/training/test_kills.py --kills 50` kills each training more often.
"""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_files import annotation, write_coco
from label_map_files import write_shapes
from safetensors.torch import load_file

import sparkmim
from killing import REFUSED, before_each_write, forked, killed_after, killed_at, status_of
from sparkmim.runs.history import read_history

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


def files_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in (run / "weights").iterdir()}


def same(run: Path, other: Path) -> bool:
    """Whether two finished runs left the same weights, and both say that they finished."""
    found, expected = files_of(run), files_of(other)
    return (
        found.keys() == expected.keys()
        and all(torch.equal(found[file][name], expected[file][name]) for file in found for name in expected[file])
        and all(read_history(each / "history.jsonl")[-1].kind == "finish" for each in (run, other))
        and not list(run.rglob(".lock"))
    )


def go_on(train: Callable[..., Any], settings: dict[str, Any], run: Path) -> None:
    """Resumes a run that was killed, or gives the same command again if there was no checkpoint yet."""
    there = (run / "checkpoints" / "last.ckpt").exists()
    assert train(**({"resume": True} if there else settings), out=run).finished


@pytest.fixture(params=["pretrain", "finetune", "segment", "detect"])
def training(
    request: pytest.FixtureRequest, small_pretraining: dict[str, Any], network: str, photos: Path, tmp_path: Path
) -> tuple[Callable[..., Any], dict[str, Any], int]:
    """A training, its settings, and how often it is killed."""
    shared = {"model": network, "workers": 0, "precision": "32-true", "save_minutes": 1e-9, "ema": 0.5}
    if request.param == "pretrain":
        return sparkmim.pretrain, {**small_pretraining, **shared, "val_split": 0.25, "keep_every": 1, "epochs": 2}, 4
    if request.param == "finetune":
        return sparkmim.finetune, {
            **shared, "data": photos, "image_size": 32, "batch_size": 6, "epochs": 2, "val_split": 0.25,
        }, 1  # fmt: skip
    shared |= {"iterations": 2, "warmup_iterations": 1, "batch_size": 2, "eval_short_side": 32}
    if request.param == "segment":
        return sparkmim.segment, {**shared, "data": write_shapes(tmp_path / "shapes"), "short_side": 32, "crop": 32}, 1
    if request.config.getoption("--kills") is None:
        pytest.skip("a minute long; --kills runs it")
    for part in ("train2017", "val2017"):
        write_coco(
            tmp_path / "coco", [annotation(10, 3, (5, 5, 30, 30)), annotation(11, 12, (10, 8, 40, 36))], part=part
        )
    return sparkmim.detect, {
        **shared, "data": tmp_path / "coco", "short_sides": [32], "long_side": 64, "regions": 16,
    }, 1  # fmt: skip


@pytest.fixture
def kills(request: pytest.FixtureRequest, training: tuple[Callable[..., Any], dict[str, Any], int]) -> int:
    """How often a training is killed: as `--kills` says, or a few times."""
    asked = request.config.getoption("--kills")
    return asked if asked is not None else training[2]


def test_kills_between_two_writes(
    training: tuple[Callable[..., Any], dict[str, Any], int], kills: int, tmp_path: Path
) -> None:
    """Among them those between the files of a save."""
    train, settings, _ = training
    writes: list[int] = []
    with before_each_write(writes.append):
        train(**settings, out=tmp_path / "whole")
    survived = 0
    for write in [1, *random.Random(0).sample(writes[1:], min(kills, len(writes) - 1))]:
        run = tmp_path / f"run{write}"
        if killed_at(write, functools.partial(train, **settings, out=run)):
            go_on(train, settings, run)
            survived += 1
        assert same(run, tmp_path / "whole"), f"killed before write {write} of {len(writes)}"
    assert survived >= min(kills, len(writes) - 1)  # what is remembered of the data set is written but once
    print(f"{survived} kills between two of {len(writes)} writes")


def test_a_run_that_is_killed_again_and_again(
    training: tuple[Callable[..., Any], dict[str, Any], int], kills: int, tmp_path: Path
) -> None:
    """At moments between its start and as long as it takes, until it is through."""
    train, settings, _ = training
    killed = 0
    begun = time.perf_counter()
    assert status_of(forked(functools.partial(train, **settings, out=tmp_path / "whole"))) == 0
    length, draw, run = time.perf_counter() - begun, random.Random(0), tmp_path / "run0"
    for kill in range(kills):
        resume = (run / "checkpoints" / "last.ckpt").exists()
        going_on = functools.partial(train, **({"resume": True} if resume else settings), out=run)
        if killed_after(draw.uniform(0, length), going_on):
            killed += 1
        else:
            assert same(run, tmp_path / "whole"), f"after {kill} kills"
            run = tmp_path / f"run{kill}"
    go_on(train, settings, run)
    assert same(run, tmp_path / "whole")
    print(f"{killed} kills at random moments")


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_that_start_at_once_one_goes_on(resume: bool, small_pretraining: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**small_pretraining, "epochs": 8}
    sparkmim.pretrain(**settings, out=tmp_path / "whole")
    if resume:
        assert killed_at(20, functools.partial(sparkmim.pretrain, **settings, out=run, save_minutes=1e-9))
        settings = {"resume": True}
    children = [forked(functools.partial(sparkmim.pretrain, **settings, out=run)) for _ in range(2)]
    assert sorted(map(status_of, children)) == [0, REFUSED]
    assert same(run, tmp_path / "whole")
