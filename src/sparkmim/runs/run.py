"""A run as its folder tells it: settings, curves, pictures, sessions, and scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from sparkmim.drawing.charts import Curve
from sparkmim.errors import UserError
from sparkmim.runs.folder import PICTURES, RunFolder, read_json
from sparkmim.runs.history import Event, beginnings, read_history, settled_settings, without_lost_steps
from sparkmim.runs.legacy import read_legacy, read_picture


@dataclass(frozen=True)
class Run:
    """A run, in whatever state it is."""

    folder: RunFolder
    events: list[Event]
    asked: dict[str, Any]  # arguments as the user gave them
    objects: list[str]  # names of the arguments that were Python objects, which no file can hold
    metrics: dict[str, Any] | None
    evaluations: list[dict[str, Any]]  # results of `sparkmim evaluate` in the folder

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Reads a run folder, also one of a version that wrote no `history.jsonl`."""
        folder = RunFolder(path)
        if not folder.path.exists():
            raise UserError(f"{folder.path} does not exist; name the run folder of a training")
        if not folder.config.is_file():
            missing = f"{folder.path} holds no run, for there is no {folder.config.name} in it"
            raise UserError(f"{missing}; name the run folder of a training")
        asked = folder.read_config()
        objects = list(asked.pop("from_python", ()))
        events = read_history(folder.history) if folder.history.is_file() else []
        if not any(event.kind == "start" for event in events):
            events = without_lost_steps([*read_legacy(folder, asked, events), *events])
        found = [read_json(path) for path in sorted(folder.evaluation.glob("*.json"))]
        evaluations = [each for each in found if isinstance(each, dict) and {"protocol", "rows"} <= set(each)]
        return cls(folder, events, asked, objects, read_json(folder.metrics), evaluations)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Values in force."""
        return settled_settings(self.events)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Scalars by name: those of steps, `val/NAME` and `val/ema_NAME`, `probe/NAME` and `probe/ema_NAME`."""
        curves: dict[str, Curve] = defaultdict(lambda: Curve([], [], []))
        for event in self.events:
            for name, value in _scalars(event):
                curves[name].steps.append(event.step)
                curves[name].values.append(value)
                curves[name].times.append(event.time.timestamp())
        return dict(curves)

    @property
    def pictures(self) -> list[Event]:
        """Reconstructions, by rising step."""
        return [event for event in self.events if event.kind == "picture" and event.fields["name"] == PICTURES]

    def png(self, picture: Event) -> bytes | None:
        """Reads the file of a picture; None if it was deleted."""
        path, place = self.folder.path / picture.fields["file"], picture.fields.get("offset")
        if not path.is_file():
            return None
        return path.read_bytes() if place is None else read_picture(path, place, picture.fields["size"])

    @cached_property
    def beginnings(self) -> list[Event]:
        """The start and the resumptions."""
        return beginnings(self.events)

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """Environments that the run was started and resumed in."""
        return [event.fields["environment"] for event in self.beginnings if event.fields["environment"]]

    @property
    def steps(self) -> int | None:
        """Optimiser steps of the whole run; None if they are not known."""
        return next((steps for event in reversed(self.beginnings) if (steps := event.fields["steps"])), None)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return max((event.step for event in self._progress), default=0)

    @property
    def state(self) -> str:
        """Whether the run is finished, stopped, or how far it is."""
        turn = [event.kind for event in self.events if event.kind in ("start", "resume", "stop", "finish")][-1]
        if self.steps is None:
            return f"at step {self.step:,}"
        if self.step >= self.steps:
            return "finished"
        words = {"stop": "stopped ", "finish": "finished "}.get(turn, "")
        return f"{words}at step {self.step:,} of {self.steps:,}"

    @property
    def started(self) -> datetime:
        """Time of the start, in the time zone of the machine."""
        return self.beginnings[0].time

    @property
    def seconds(self) -> float | None:
        """Time spent on the steps that the run has, without pauses; None before the first was logged."""
        starts = [event.time.timestamp() for event in self.beginnings]
        times = [event.time.timestamp() for event in self._progress if event.kind not in ("start", "resume")]
        if not times:
            return None
        spans = zip(starts, [*starts[1:], float("inf")], strict=True)
        return sum(max([start, *(time for time in times if start <= time < end)]) - start for start, end in spans)

    @property
    def unreadable(self) -> list[str]:
        """Path and reason of each image that was skipped."""
        found = (event.fields for event in self.events if event.kind == "unreadable")
        return list(dict.fromkeys(f"{fields['image']}: {fields['reason']}" for fields in found))

    @property
    def _progress(self) -> list[Event]:
        return [event for event in self.events if event.kind not in ("unreadable", "warning")]


def _scalars(event: Event) -> Iterator[tuple[str, float]]:
    """Yields names and values of the curves that an event adds to."""
    prefix, figures = "", {}
    if event.kind == "step":
        figures = event.fields
    elif event.kind == "validation":
        beside = event.fields["weights"] == "ema" and event.fields.get("beside_model", True)
        prefix, figures = "val/ema_" if beside else "val/", event.fields["figures"]
    elif event.kind == "probe":
        prefix, figures = "probe/ema_" if event.fields["weights"] == "ema" else "probe/", event.fields["figures"]
    for name, value in figures.items():
        if isinstance(value, (int, float)):
            yield prefix + name, float(value)
