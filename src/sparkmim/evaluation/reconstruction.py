"""Score of a pretraining: the loss on images that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from sparkmim.errors import UnusableData
from sparkmim.evaluation.scores import evaluation_mode, readable, sum_over_processes
from sparkmim.models import SparK


@dataclass(frozen=True)
class ReconstructionScores:
    """Mean loss of hidden patches; predicting the mean of each patch scores 1."""

    loss: float

    @property
    def figures(self) -> dict[str, float]:
        return {"loss": self.loss}

    @property
    def main(self) -> float:
        return -self.loss

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Table:
        table = Table("held-out loss", box=None, padding=(0, 2, 0, 0))
        table.add_row(f"{self.loss:.4f}")
        return table


@torch.no_grad()
def score_reconstruction(
    model: SparK,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> ReconstructionScores:
    """Computes the loss of a model in evaluation mode; in a distributed run, on the images of all processes.

    Args:
        batches: dicts with `image`, `visible` and `skipped`, for this process; skipped images do not count.
        precision: returns the context of a forward pass.

    Raises:
        UnusableData: if no image can be read.
    """
    total = torch.zeros(2, device=device)  # sum of losses, number of images
    with evaluation_mode(model):
        for batch in readable(batches):
            count = len(batch["image"])
            with precision():
                loss = model(batch["image"].to(device), batch["visible"]).loss
            # Every image has as many hidden patches, so means of batches are weighted by images.
            total += torch.stack([loss.float() * count, total.new_tensor(count)])
    if not sum_over_processes(total)[1]:
        raise UnusableData("none of the held-out images could be read")
    return ReconstructionScores((total[0] / total[1]).item())
