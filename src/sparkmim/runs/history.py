"""History of a run: `history.jsonl`, one JSON object per event, from which reports, logs and loggers are fed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from sparkmim.errors import UserError

Kind = Literal[
    "start", "resume", "step", "epoch", "validation", "picture", "unreadable", "warning", "checkpoint", "stop", "finish"
]  # fmt: skip
"""Kinds of events.

| event | fields besides `time`, `event` and `step` |
| --- | --- |
| `start`, `resume` | `steps` of the whole run, `settings` as settled, `environment` |
| `step` | `epoch`, `loss`, `learning_rate`, `weight_decay`, `gradient_norm`, `images_per_second` |
| `epoch` | `epoch`, `epochs`, `loss` as the mean over the epoch, `learning_rate`, `images_per_second` |
| `validation` | `weights` (`model` or `ema`), `figures` by name |
| `picture` | `name`, `file` relative to the run folder |
| `unreadable` | `image`, `reason`, `part` of the data (`training` or `validation`) |
| `warning` | `message` |
| `checkpoint`, `stop`, `finish` | – |
"""

logger = logging.getLogger("sparkmim")


@dataclass(frozen=True)
class Event:
    """One thing that happened in a run.

    Attributes:
        kind: of the event.
        step: optimiser steps done when it happened.
        time: with its time zone.
        fields: by name, as JSON takes them; see `Kind`.
    """

    kind: Kind
    step: int
    time: datetime
    fields: dict[str, Any]

    def to_json(self) -> str:
        """One line of `history.jsonl`, without its end."""
        head = {"time": self.time.isoformat(timespec="milliseconds"), "event": self.kind, "step": self.step}
        return json.dumps({**head, **self.fields})

    @classmethod
    def from_json(cls, line: str) -> Event:
        """Reads one line of `history.jsonl`.

        Raises:
            ValueError: if the line is no event.
        """
        found = json.loads(line)
        if not isinstance(found, dict) or found.get("event") not in get_args(Kind):
            raise ValueError("no event of a run")
        time = datetime.fromisoformat(str(found.pop("time", "")))
        return cls(found.pop("event"), int(found.pop("step")), time, found)


Listener = Callable[[Event], None]


class History:
    """Appends events to `history.jsonl` and tells them to listeners.

    Args:
        path: of the file; None to tell listeners alone, as on all ranks but the first.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.listeners: list[Listener] = [_to_log]

    def add(self, kind: Kind, step: int, **fields: Any) -> Event:
        """Records an event that happens now."""
        event = Event(kind, step, datetime.now().astimezone(), fields)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(event.to_json() + "\n")
        for listener in self.listeners:
            listener(event)
        return event


def read_history(path: Path) -> list[Event]:
    """Reads the events of a run, without those of steps that were lost.

    Where a run was killed and resumed from an earlier checkpoint, what happened after that checkpoint is left out. A
    last line that was cut off by a kill is left out too.

    Raises:
        ValueError: if another line is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    events: list[Event] = []
    for number, line in enumerate(lines, 1):
        try:
            event = Event.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"line {number} of {path} is damaged; remove it to have the rest read") from error
        if event.kind == "resume":
            events = [earlier for earlier in events if earlier.step <= event.step or earlier.kind in _KEPT]
        events.append(event)
    return events


_KEPT = ("start", "resume", "stop", "unreadable", "warning")
"""Kinds of events that stay known although their steps were lost."""


# The log


def sentence(event: Event) -> tuple[int, str] | None:
    """Level and words of an event in `log.txt`; None for events that are not written there."""
    said = event.fields
    match event.kind:
        case "start":
            return logging.INFO, f"started: {said['steps']} steps in all"
        case "resume":
            return logging.INFO, f"resumed at step {event.step}: {said['steps']} steps in all"
        case "epoch":
            return logging.INFO, (
                f"epoch {said['epoch']}/{said['epochs']}  step {event.step}  loss {said['loss']:.4f}  rate "
                f"{said['learning_rate']:.3g}  {said['images_per_second']:.0f} images/s"
            )
        case "validation":
            figures = "  ".join(f"{name} {value:.4g}" for name, value in said["figures"].items())
            average = " of the average" if said["weights"] == "ema" else ""
            return logging.INFO, f"step {event.step}  validation{average}: {figures}"
        case "unreadable":
            part = "validation image left out" if said["part"] == "validation" else "image skipped"
            return logging.WARNING, f"unreadable {part}: {said['image']}: {said['reason']}"
        case "stop":
            return logging.INFO, f"stopped at step {event.step} on request; continue with --resume"
        case "finish":
            return logging.INFO, f"finished at step {event.step}"
        case _:
            return None


def _to_log(event: Event) -> None:
    if said := sentence(event):
        logger.log(*said, extra={"event": event})


class _Warnings(logging.Handler):
    """Makes events of warnings that other parts of the package log."""

    def __init__(self, history: History, step: Callable[[], int]) -> None:
        super().__init__(logging.WARNING)
        self.history, self.step = history, step

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "event"):
            self.history.add("warning", self.step(), message=record.getMessage())


@contextmanager
def logged(history: History, log: Path, step: Callable[[], int]) -> Iterator[None]:
    """Writes what the package logs to a file, and warnings to the history too, within the context.

    Args:
        history: of the run.
        log: the file, which is appended to.
        step: tells the optimiser steps done.
    """
    file = logging.FileHandler(log, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
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


def settled_settings(events: list[Event]) -> Mapping[str, Any]:
    """Settings as the last start or resumption settled them; empty if there is none."""
    begun = [event for event in events if event.kind in ("start", "resume")]
    settings: Mapping[str, Any] = begun[-1].fields["settings"] if begun else {}
    return settings
