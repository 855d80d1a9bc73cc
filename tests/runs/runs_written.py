"""Run folders without any training."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sparkmim.runs.folder import PICTURES, RunFolder
from sparkmim.runs.history import Event, Kind

START = datetime.fromtimestamp(1e9).astimezone()
LOSSES = {10 * i: 1.5 / i for i in range(1, 7)}
SETTINGS = {"data": "photos", "model": "resnet50", "image_size": [8, 16], "epochs": 6.0, "accelerator": "cpu"}
ENVIRONMENT = {
    "date": START.isoformat(), "sparkmim": "0.1.0", "python": "3.11.2", "torch": "2.11.0", "torchvision": "0.26.0",
    "timm": "1.0.20", "lightning": "2.5", "platform": "Linux", "cpu": "Abacus 9000", "threads": 4, "memory_gib": 31.2,
    "gpus": [], "cuda": None, "processes": 1,
}  # fmt: skip


def event(kind: Kind, step: int, begun: datetime = START, **fields: Any) -> Event:
    """An event of a run that does a step per second."""
    return Event(kind, step, begun + timedelta(seconds=step), fields)


def start(steps: int, settings: dict[str, Any] | None = None, **environment: Any) -> Event:
    """The start of a run."""
    settled = {**SETTINGS, **(settings or {})}
    return event("start", 0, steps=steps, settings=settled, environment={**ENVIRONMENT, **environment})


def write_run(
    run: Path,
    settings: dict[str, Any] | None = None,
    events: Sequence[Event] = (),
    asked: dict[str, Any] | None = None,
) -> Path:
    """A run folder with settings, some of which were left open, and a history if there are events."""
    settled = {**SETTINGS, **(settings or {})}
    RunFolder(run).write_config({**settled, **(asked or {})}, settled)
    if events:
        append(run, *events)
    return run


def append(run: Path, *events: Event) -> None:
    """Adds events to the history."""
    with RunFolder(run).history.open("a") as file:
        file.writelines(f"{each.to_json()}\n" for each in events)


def write_png(run: Path, picture: Tensor, step: int) -> None:
    """Adds a picture uint8 `[3, H, W]` of a step."""
    name = f"pictures/{step}.png"
    (run / "pictures").mkdir(exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(run / name)
    append(run, event("picture", step, name=PICTURES, file=name))


def grid(images: int, step: int) -> Tensor:
    """A picture as training makes it, of 8 × 16 images whose grey tells image, column and step: `[3, H, W]`."""
    tones = 10 * torch.arange(images)[:, None] + torch.arange(3) + step  # [images, columns]
    return tones.to(torch.uint8).repeat_interleave(12, dim=0).repeat_interleave(20, dim=1).expand(3, -1, -1)
