"""What a run folder tells of its run: settings, curves, pictures, log, machines, and scores."""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sparkmim.drawing.charts import Curve
from sparkmim.errors import UserError
from sparkmim.runs.folder import PICTURES, RunFolder

T = TypeVar("T")
Point = tuple[float, int, T]
"""Time in seconds since 1970, step, and what was logged."""


@dataclass(frozen=True)
class Picture:
    """A picture in an event file; read when it is wanted, since a long run has gigabytes of them.

    Attributes:
        step: of the run.
        file: the event file.
        offset: of the event in it, in bytes.
        size: of the event, in bytes.
    """

    step: int
    file: Path
    offset: int
    size: int

    def png(self) -> bytes:
        """The encoded picture."""
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

        with self.file.open("rb") as file:
            file.seek(self.offset)
            event = Event.FromString(file.read(self.size))
        return bytes(next(value.image.encoded_image_string for value in event.summary.value if value.tag == PICTURES))


@dataclass(frozen=True)
class Record:
    """All that is known of a run.

    Attributes:
        folder: of the run.
        settings: in force.
        objects: names of the settings that were Python objects, which no file can hold.
        curves: by TensorBoard tag.
        pictures: of reconstructions, by rising step.
        messages: lines of the log, without the time.
        sessions: the environment at the start and at each resumption.
        metrics: of a classifier; None of other runs.
        evaluations: those whose results lie in the folder.
    """

    folder: RunFolder
    settings: dict[str, Any]
    objects: list[str]
    curves: dict[str, Curve]
    pictures: list[Picture]
    messages: list[str]
    sessions: list[dict[str, Any]]
    metrics: dict[str, Any] | None
    evaluations: list[dict[str, Any]]

    @classmethod
    def of(cls, run: str | Path) -> Record:
        """Reads a run folder, in whatever state the run is.

        Raises:
            ValueError: if it is none, or a file in it is damaged.
        """
        folder = RunFolder(run)
        if not folder.path.exists():
            raise UserError(f"{folder.path} does not exist; name the run folder of a pretraining or a fine-tuning")
        if not folder.config.is_file():
            raise UserError(
                f"{folder.path} holds no run, for there is no {folder.config.name} in it; name the run folder of a "
                "pretraining or a fine-tuning"
            )
        try:
            settings = folder.read_config()
            objects = list(settings.pop("from_python", ()))
        except (yaml.YAMLError, AttributeError) as error:
            raise UserError(f"{folder.config} cannot be read as the settings of a run") from error
        curves, pictures = read_events(folder.path / "tensorboard")
        found = [_read_json(path) for path in sorted((folder.path / "evaluation").glob("*.json"))]
        return cls(
            folder,
            settings,
            objects,
            curves,
            pictures,
            _messages(folder.log),
            _read_json(folder.environment) or [],
            _read_json(folder.path / "metrics.json"),
            [each for each in found if isinstance(each, dict) and {"protocol", "rows"} <= set(each)],
        )

    @property
    def steps(self) -> int | None:
        """Optimiser steps that the run has, if the log says so."""
        counts = [int(n) for n in self._said(r"(?:started|resumed): (\d+) steps in all")]
        return counts[-1] if counts else None

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        logged = [curve.steps[-1] for curve in self.curves.values()]
        return max([*logged, *(int(n) for n in self._said(r"stopped at step (\d+) on request")), 0])

    @property
    def state(self) -> str:
        """In words, by a curve's last step and the log: finished, stopped, or how far it is."""
        if self.steps is None:
            return f"at step {self.step:,}"
        if self.step >= self.steps:
            return "finished"
        turns = self._said(r"(started|resumed|stopped)(?:: \d+ steps in all| at step \d+ on request)")
        return f"{'stopped ' if turns[-1] == 'stopped' else ''}at step {self.step:,} of {self.steps:,}"

    @property
    def started(self) -> datetime:
        """When the run began, in the time zone of the machine that it began on, if that is known."""
        if self.sessions:
            return datetime.fromisoformat(self.sessions[0]["date"])
        times = [curve.times[0] for curve in self.curves.values()]
        return datetime.fromtimestamp(min(times) if times else self.folder.config.stat().st_mtime).astimezone()

    @property
    def seconds(self) -> float | None:
        """Time spent on training, without the pauses between a stop and a resumption; None if nothing was logged."""
        times = sorted({time for curve in self.curves.values() for time in curve.times})
        if not times:
            return None
        starts = [datetime.fromisoformat(session["date"]).timestamp() for session in self.sessions] or [times[0]]
        total = 0.0
        for start, end in zip(starts, [*starts[1:], float("inf")], strict=True):
            within = [time for time in times if start <= time < end]
            total += within[-1] - start if within else 0.0
        return total

    @property
    def unreadable(self) -> list[str]:
        """Path and reason of each image that was skipped, once."""
        return list(dict.fromkeys(self._said(r"unreadable (?:validation )?image (?:skipped|left out): (.*)")))

    def _said(self, pattern: str) -> list[str]:
        """What the group in the pattern stands for, in each message that begins so."""
        found = (re.match(pattern, message, flags=re.DOTALL) for message in self.messages)
        return [match[1] for match in found if match is not None]


def _messages(log: Path) -> list[str]:
    """A log's messages; one that goes over several lines is one."""
    if not log.is_file():
        return []
    text = log.read_text(encoding="utf-8", errors="replace")
    return [part.rstrip("\n") for part in re.split(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", text, flags=re.MULTILINE)[1:]]


def _read_json(path: Path) -> Any:
    """What a file holds; None if there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON file ({error}); move it away to have the rest reported") from error


# TensorBoard's event files. Its own reader verifies checksums of all pictures byte by byte, in Python: minutes for a
# long run. They are records of length, checksum, protocol buffer, checksum.


def read_events(folder: Path) -> tuple[dict[str, Curve], list[Picture]]:
    """Curves by tag, and pictures of reconstructions, of all event files in a folder.

    Where a run was killed and resumed from an earlier checkpoint, what the checkpoint did not know is left out.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    scalars: dict[str, list[Point[float]]] = defaultdict(list)
    pictures: list[Point[Picture]] = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=_age):
        for offset, record in _records(path):
            event = Event.FromString(record)
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                if kind == "simple_value":
                    scalars[value.tag].append((event.wall_time, event.step, value.simple_value))
                elif kind == "image" and value.tag == PICTURES:
                    picture = Picture(event.step, path, offset, len(record))
                    pictures.append((event.wall_time, event.step, picture))
    curves = {}
    for tag, points in scalars.items():
        times, steps, values = zip(*_without_orphans(points), strict=True)
        curves[tag] = Curve(list(steps), list(values), list(times))
    return curves, [picture for *_, picture in _without_orphans(pictures)]


def _age(path: Path) -> tuple[str, int]:
    """By the second in the name, then by the last change."""
    return path.name.split(".")[3], path.stat().st_mtime_ns


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and content of the records of a file, up to where it was cut off."""
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (size,) = struct.unpack("<Q4x", header)
            offset = file.tell()
            record = file.read(size)
            if len(record) < size:
                return
            yield offset, record
            file.seek(4, 1)


def _without_orphans(points: list[Point[T]]) -> list[Point[T]]:
    """Points as they came, without those that a later one has gone back behind."""
    kept: list[Point[T]] = []
    for point in points:
        while kept and kept[-1][1] >= point[1]:
            kept.pop()
        kept.append(point)
    return kept
