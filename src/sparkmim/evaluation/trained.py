"""What scoring and using detectors and segmenters have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparkmim.data.decoding import UnreadableImage
from sparkmim.data.source import images_source
from sparkmim.errors import UserError
from sparkmim.evaluation.scores import Scores, write_metrics
from sparkmim.files import replacing
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.machine import settle_machine
from sparkmim.terminal import Terminal


def open_trained(
    kind: str, weights: str | Path, out: Path, accelerator: str, precision: str, workers: int | None
) -> tuple[Weights, torch.device, bool, int]:
    """Opens the weights of a `kind`, and settles the device, whether to compute in bfloat16, and the loader processes.

    Raises:
        UserError: if there are no weights.
    """
    if weights == "none":
        raise UserError(f"no weights given; --weights names the run folder or the weight file of a {kind}")
    opened = open_weights(weights)
    machine = settle_machine(accelerator, 1, 1, precision, workers)
    return opened, torch.device(machine["accelerator"]), machine["precision"] == "bf16-mixed", machine["workers"]


def read_images(console: Terminal, images: Any, channels: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yields a file name without suffix, the path, and the image `[C, H, W]`: uint8, or float32 for arrays.

    Takes anything that `images_source` does. Unreadable images are reported on the console and left out.

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
            console.print(f"left out: {error}")
            continue
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image, dtype=np.float32))
        yield f"{number:05d}-{Path(str(item)).stem}", str(item), image
    if unreadable == len(source.items):
        raise UserError(f"none of the {unreadable} images can be read")


def save_picture(picture: Tensor, path: Path) -> None:
    """Writes a picture, uint8 `[3, H, W]`, as JPEG."""
    with replacing(path) as partial:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(partial, quality=92)


def report_scores(console: Terminal, out: Path, scores: Scores) -> None:
    """Prints scores as a table and writes `metrics.json` into `out`, which is created."""
    write_metrics(out, scores.as_json())
    console.print(scores.table())
