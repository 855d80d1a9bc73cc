"""Runs from before `history.jsonl`: their events, read from TensorBoard files, log and environment."""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from sparkmim.runs.folder import PICTURES, RunFolder, read_json
from sparkmim.runs.history import Event, Kind

T = TypeVar("T")
Point = tuple[float, int, T]
"""Time in seconds since 1970, step, and what was logged."""

Picture = tuple[Path, int, int]
"""Event file, and offset and size in bytes of the event that holds the picture."""


def read_legacy(folder: RunFolder, settings: Mapping[str, Any], later: list[Event]) -> list[Event]:
    """Reads the events of a run that an earlier version wrote, in the order in which they happened.

    `later` is the run's history, if it was resumed by this version.
    """
    until = later[0].time.timestamp() if later else math.inf
    messages = [(time, said) for time, said in _messages(folder.log) if time.timestamp() + 1 <= until]
    known = [event.fields["environment"].get("date") for event in later if event.kind == "resume"]
    sessions = [each for each in read_json(folder.environment) or [] if each["date"] not in known]
    scalars, pictures = read_tensorboard(folder.tensorboard, until)
    # The log comes first: its times are whole seconds, and sorting keeps the order of equal ones.
    events = _message_events(messages, sessions) + _scalar_events(scalars)
    for time, step, (file, offset, size) in pictures:
        place = {"name": PICTURES, "file": f"{folder.tensorboard.name}/{file.name}", "offset": offset, "size": size}
        events.append(Event("picture", step, _local(time), place))
    events.sort(key=lambda event: event.time)
    if not any(event.kind == "start" for event in events):
        first = events[0].time if events else _local(folder.config.stat().st_mtime)
        events.insert(0, _beginning("start", first, None, {}))
    done = 0
    for index, event in enumerate(events):
        if event.kind in ("start", "resume"):
            events[index] = replace(event, step=done, fields={**event.fields, "settings": dict(settings)})
        elif event.kind in ("step", "validation", "stop"):
            done = max(done, event.step)
    return events


def _scalar_events(scalars: Mapping[str, list[Point[float]]]) -> list[Event]:
    """Joins scalars of one step in one event, and those of one validation."""
    values: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)  # by step, and weights if it is a validation
    times: dict[tuple[int, str], float] = {}
    for tag, points in scalars.items():
        validation = re.fullmatch(r"val/(ema_)?(.*)", tag)
        weights = "" if validation is None else "ema" if validation[1] else "model"
        for time, step, value in points:
            values[step, weights][validation[2] if validation else tag] = value
            times[step, weights] = min(time, times.get((step, weights), time))
    return [
        Event("validation", step, _local(times[step, weights]), {"weights": weights, "figures": figures})
        if weights
        else Event("step", step, _local(times[step, weights]), {**figures})
        for (step, weights), figures in values.items()
    ]


def _message_events(messages: list[tuple[datetime, str]], sessions: list[dict[str, Any]]) -> list[Event]:
    """Returns beginnings, stops and unreadable images that the log tells, and beginnings that only have a session."""
    events = []
    left = iter(sessions)
    for time, said in messages:
        if match := re.match(r"(started|resumed): (\d+) steps in all", said):
            kind: Kind = "start" if match[1] == "started" else "resume"
            events.append(_beginning(kind, time, int(match[2]), next(left, {})))
        elif match := re.match(r"stopped at step (\d+) on request", said):
            events.append(Event("stop", int(match[1]), time, {}))
        elif match := re.match(r"unreadable (validation )?image (?:skipped|left out): (.*)", said, flags=re.DOTALL):
            image, _, reason = match[2].rpartition(": ")
            part = "validation" if match[1] else "training"
            events.append(Event("unreadable", 0, time, {"image": image, "reason": reason, "part": part}))
    for session in left:
        events.append(_beginning("start" if session is sessions[0] else "resume", _local(0), None, session))
    return events


def _beginning(kind: Kind, time: datetime, steps: int | None, environment: dict[str, Any]) -> Event:
    """Returns a start or resumption; an environment knows its time, and that it began before the log did."""
    time = datetime.fromisoformat(environment["date"]) if environment else time
    return Event(kind, 0, time, {"steps": steps, "environment": environment})


def _local(time: float) -> datetime:
    return datetime.fromtimestamp(time).astimezone()


def _messages(log: Path) -> list[tuple[datetime, str]]:
    """Reads times and messages, which may go over several lines."""
    if not log.is_file():
        return []
    text = log.read_text(encoding="utf-8", errors="replace")
    parts = re.split(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  ", text, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [(datetime.fromisoformat(time).astimezone(), said.rstrip("\n")) for time, said in pairs]


# TensorBoard's own reader verifies checksums of all pictures byte by byte, in Python: minutes for a long run. Its event
# files are records of length, checksum, protocol buffer, checksum.


def read_tensorboard(folder: Path, until: float) -> tuple[dict[str, list[Point[float]]], list[Point[Picture]]]:
    """Reads scalars by tag, and places of reconstructions, from all event files in a folder.

    Where a run was killed and resumed from an earlier checkpoint, the lost steps are left out, and so is everything
    from the time `until` on, in seconds since 1970.
    """
    from tensorboard.compat.proto.event_pb2 import Event as Record  # type: ignore[import-untyped]

    scalars: dict[str, list[Point[float]]] = defaultdict(list)
    pictures: list[Point[Picture]] = []
    files = folder.glob("events.out.tfevents.*")  # to sort by the second in the name, and the time of the last change
    for path in sorted(files, key=lambda file: (file.name.split(".")[3], file.stat().st_mtime_ns)):
        for offset, content in _records(path):
            record = Record.FromString(content)
            if record.wall_time >= until:
                break
            for value in record.summary.value:
                kind = value.WhichOneof("value")
                if kind == "simple_value":
                    scalars[value.tag].append((record.wall_time, record.step, value.simple_value))
                elif kind == "image" and value.tag == PICTURES:
                    pictures.append((record.wall_time, record.step, (path, offset, len(content))))
    return {tag: _without_lost(points) for tag, points in scalars.items()}, _without_lost(pictures)


def read_picture(path: Path, offset: int, size: int) -> bytes:
    """Reads the PNG file of a reconstruction from an event file."""
    from tensorboard.compat.proto.event_pb2 import Event as Record

    with path.open("rb") as file:
        file.seek(offset)
        record = Record.FromString(file.read(size))
    return bytes(next(value.image.encoded_image_string for value in record.summary.value if value.tag == PICTURES))


def _records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Reads offset and content of each record that is complete."""
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (size,) = struct.unpack("<Q4x", header)
            offset = file.tell()
            content = file.read(size)
            if len(content) < size:
                return
            yield offset, content
            file.seek(4, 1)


def _without_lost(points: list[Point[T]]) -> list[Point[T]]:
    """Drops points that are followed by one of the same or an earlier step."""
    kept: list[Point[T]] = []
    for point in points:
        while kept and kept[-1][1] >= point[1]:
            kept.pop()
        kept.append(point)
    return kept
