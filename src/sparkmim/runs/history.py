"""History of a run: `history.jsonl`, one JSON object per event, which feeds the report, the log and the loggers."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from sparkmim.errors import UserError
from sparkmim.terminal import printable

Kind = Literal[
    "start", "resume", "step", "epoch", "validation", "probe", "picture", "unreadable", "warning", "checkpoint", "stop",
    "finish",
]  # fmt: skip
"""Kinds of events.

| event | fields besides `time`, `event` and `step` |
| --- | --- |
| `start`, `resume` | `steps` of the whole run, `settings` as settled, `environment`, `loggers` (their names), `data` |
| `step` | `epoch`, `loss`, `learning_rate`, `weight_decay`, `gradient_norm`, `images_per_second`; `contrast`, if any |
| `epoch` | `epoch`, `epochs`, `loss` as the mean over the epoch, `learning_rate`, `images_per_second` |
| `validation` | `weights` (`model` or `ema`), `figures` by name, `beside_model`: whether both are validated |
| `probe` | `weights`, `figures` and `start` (before the first step) by name, `seconds` that it took |
| `picture` | `name`, `file` relative to the run folder |
| `unreadable` | `image`, `reason`, `part` of the data (`training`, `validation` or `probe`) |
| `warning` | `message` |
| `checkpoint`, `stop`, `finish` | – |
"""

_KEPT = ("start", "resume", "stop", "unreadable", "warning")
"""Kinds of events that are kept although their steps were lost."""

logger = logging.getLogger("sparkmim")


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    kind: Kind
    step: int  # optimiser steps done when it happened
    time: datetime  # with a time zone
    fields: dict[str, Any]  # further values by name, as JSON takes them; see `Kind`

    def to_json(self) -> str:
        """Returns the event as a line of `history.jsonl`, without the newline."""
        head = {"time": self.time.isoformat(timespec="milliseconds"), "event": self.kind, "step": self.step}
        return json.dumps({**head, **self.fields})

    @classmethod
    def from_json(cls, line: str) -> Event:
        """Reads one line of `history.jsonl`; raises ValueError, KeyError or TypeError if it is no event."""
        found = json.loads(line)
        if not isinstance(found, dict) or found.get("event") not in get_args(Kind):
            raise ValueError("not an event of a run")
        if found["event"] in ("start", "resume") and not isinstance(found.get("settings"), dict):
            raise ValueError("a beginning without settings")
        time = datetime.fromisoformat(str(found.pop("time", "")))
        return cls(found.pop("event"), int(found.pop("step")), time, found)


Listener = Callable[[Event], None]


class History:
    """Appends events to `history.jsonl` and passes them to listeners; to these only on all ranks but the first."""

    def __init__(self, path: Path | None) -> None:
        if path is not None and path.is_file():
            whole = path.read_bytes().rfind(b"\n") + 1
            os.truncate(path, whole)  # a last line that was cut off by a kill
        self.path = path
        self.listeners: list[Listener] = [] if path is None else [_to_log]

    def add(self, kind: Kind, step: int, **fields: Any) -> Event:
        """Records an event at the current time."""
        event = Event(kind, step, datetime.now().astimezone(), fields)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(event.to_json() + "\n")
        for listener in self.listeners:
            listener(event)
        return event


def read_history(path: Path) -> list[Event]:
    """Reads the events of a run, except those of lost steps and a last line that is not complete."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    events: list[Event] = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(Event.from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise UserError(f"line {number} of {path} is damaged; remove it to have the rest read") from error
    return without_lost_steps(events)


def without_lost_steps(events: Sequence[Event]) -> list[Event]:
    """Drops what happened after the checkpoint that a killed run was resumed from."""
    kept: list[Event] = []
    for event in events:
        if event.kind == "resume":
            kept = [earlier for earlier in kept if earlier.step <= event.step or earlier.kind in _KEPT]
        kept.append(event)
    return kept


# The log


def _sentence(event: Event) -> str | None:
    """Returns the message of an event in `log.txt`; None for events that are not written there."""
    said = event.fields
    match event.kind:
        case "start":
            return f"started: {said['steps']} steps in all"
        case "resume":
            return f"resumed at step {event.step}: {said['steps']} steps in all"
        case "epoch":
            figures = f"loss {said['loss']:.4f}  rate {said['learning_rate']:.3g}"
            speed = f"{said['images_per_second']:.0f} images/s"
            return f"epoch {said['epoch']}/{said['epochs']}  step {event.step}  {figures}  {speed}"
        case "validation":
            figures = "  ".join(f"{name} {value:.4g}" for name, value in said["figures"].items())
            average = " of the average" if said["weights"] == "ema" else ""
            return f"step {event.step}  validation{average}: {figures}"
        case "probe":
            figures = "  ".join(
                f"{name} {value:.1%} (start {said['start'][name]:.1%})" for name, value in said["figures"].items()
            )
            average = " of the average" if said["weights"] == "ema" else ""
            return f"step {event.step}  probe{average}: {figures}  took {said['seconds']:.1f} s"
        case "unreadable":
            part = "image skipped" if said["part"] == "training" else f"{said['part']} image left out"
            return f"unreadable {part}: {said['image']}: {said['reason']}"
        case "stop":
            return f"stopped at step {event.step} on request; continue with --resume"
        case "finish":
            return f"finished at step {event.step}"
        case _:
            return None


def _to_log(event: Event) -> None:
    if said := _sentence(event):
        logger.log(logging.WARNING if event.kind == "unreadable" else logging.INFO, said, extra={"event": event})


class _Lines(logging.Formatter):
    """Writes a message as one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's)
        record.message = printable(record.message)
        return super().formatMessage(record)


class _Warnings(logging.Handler):
    """Records the warnings that other parts of the package log."""

    def __init__(self, history: History, step: Callable[[], int]) -> None:
        super().__init__(logging.WARNING)
        self.history, self.step = history, step

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "event"):
            self.history.add("warning", self.step(), message=record.getMessage())


class _File(logging.FileHandler):
    """Writes `log.txt`; raises what the file system says, where Python's own handler prints it and goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the base class's name)
        if isinstance(sys.exc_info()[1], OSError):
            raise  # noqa: PLE0704 (it is called while the error is handled)
        super().handleError(record)


@contextmanager
def logged(history: History, log: Path, step: Callable[[], int]) -> Iterator[None]:
    """Within this context, appends the package's messages to a file, and records warnings in the history."""
    file = _File(log, encoding="utf-8")
    file.setFormatter(_Lines("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    handlers = [file, _Warnings(history, step)]
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def beginnings(events: Sequence[Event]) -> list[Event]:
    """Returns the start and the resumptions."""
    return [event for event in events if event.kind in ("start", "resume")]


def settled_settings(events: Sequence[Event]) -> Mapping[str, Any]:
    """Returns the settings of the last start or resumption; empty if there is none."""
    return next((event.fields["settings"] for event in reversed(beginnings(events))), {})
