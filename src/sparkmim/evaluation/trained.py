"""What scoring and using detectors and segmenters have in common."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from sparkmim.data.decoding import UnreadableImage
from sparkmim.data.source import images_source
from sparkmim.errors import UserError
from sparkmim.evaluation.scores import Scores, write_metrics
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.machine import device_named, has_bfloat16


def open_trained(weights: str | Path, kind: str, out: str | Path, accelerator: str) -> tuple[Weights, torch.device]:
    """Opens the weights of a detector or segmenter.

    Args:
        weights: run folder or weight file.
        kind: `detector` or `segmenter`, for messages.
        out: output folder, which must be new or empty; it is not created yet.
        accelerator: `auto`, `cpu` or `cuda`.

    Raises:
        UserError: if there are no weights, or `out` is taken.
    """
    if weights == "none":
        raise UserError(f"no weights given; --weights names the run folder or the weight file of a {kind}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; choose another --out")
    return open_weights(weights), device_named(accelerator)


def in_bfloat16(precision: str, device: torch.device) -> bool:
    """Returns whether to compute in bfloat16: if the precision is `bf16-mixed`, or `auto` and the hardware can."""
    return precision == "bf16-mixed" or (precision == "auto" and has_bfloat16(device.type))


def worker_count(workers: int | None, device: torch.device) -> int:
    """Returns the number of loader processes; None asks for a number that suits the machine."""
    if workers is not None:
        return workers
    return max(1, (os.cpu_count() or 2) - 1) if device.type == "cuda" else 2


def read_images(console: Console, images: Any, channels: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yields for each image a file name without suffix, its path, and the image `[C, H, W]`.

    Images are uint8, arrays float32. Unreadable ones are reported on the console and left out.

    Args:
        console: to report on.
        images: anything that `images_source` takes.
        channels: of the images.

    Raises:
        UserError: if no image can be read.
    """
    source = images_source(images, channels, 2)
    unreadable = 0
    for number, item in enumerate(source.items, 1):
        try:
            image = source.read(item, name=str(item))
        except UnreadableImage as error:
            unreadable += 1
            console.print(f"left out: {error}", markup=False)
            continue
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image, dtype=np.float32))
        yield f"{number:05d}-{Path(str(item)).stem}", str(item), image
    if unreadable == len(source.items):
        raise UserError(f"none of the {unreadable} images can be read")


def print_notes(console: Console, notes: Sequence[str]) -> None:
    """Prints what is noteworthy about data without being an error."""
    for note in notes:
        console.print("[yellow]note:[/] ", end="")
        console.print(note, markup=False)


def report_scores(console: Console, out: Path, scores: Scores) -> None:
    """Prints scores as a table and writes `metrics.json` into `out`, which is created."""
    write_metrics(out, scores.as_json())
    console.print(scores.table())
