"""What the scores of classifiers, detectors and segmenters have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.table import Table
from torch import Tensor, nn

from sparkmim.files import replacing


class Scores(Protocol):
    """Scores of a model on validation images."""

    @property
    def figures(self) -> dict[str, float]:
        """Figures by name; NaN where unknown."""

    @property
    def main(self) -> float:
        """Figure that weights are compared by; higher is better."""

    def as_json(self) -> dict[str, Any]:
        """Returns the content of `metrics.json`."""

    def table(self) -> Table:
        """Returns a table to print."""


def known_figures(scores: Scores) -> dict[str, float]:
    """Returns the figures that are not NaN."""
    return {name: value for name, value in scores.figures.items() if value == value}


def write_metrics(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes `metrics.json` into a folder."""
    with replacing(folder / "metrics.json") as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def readable(batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Leaves images out that stand in for unreadable ones (`skipped` above 0), and batches that hold nothing else."""
    for batch in batches:
        real = batch["skipped"] == 0
        if real.any():
            yield {name: value[real] for name, value in batch.items() if isinstance(value, Tensor)}


def sum_over_processes(total: Tensor) -> Tensor:
    """Sums a tensor over all processes, in place; returns it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and back into its own afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
