"""The history of a run: whole lines whatever happens, and the log made from it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sparkmim.errors import UserError
from sparkmim.runs.history import History, logged, read_history


def test_events_come_back(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    heard: list[object] = []
    history.listeners.append(heard.append)
    added = [history.add("step", 1, loss=0.5), history.add("unreadable", 2, image="ü\n.jpg", reason="cut", part="x")]
    assert heard == added
    read = read_history(tmp_path / "history.jsonl")
    assert [(each.kind, each.step, each.fields) for each in read] == [
        (each.kind, each.step, each.fields) for each in added
    ]
    assert not History(None).add("step", 1).fields


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    History(path).add("step", 1, loss=0.5)
    with path.open("a") as file:
        file.write('{"time": "2033-05')
    assert [each.step for each in read_history(path)] == [1]
    History(path).add("step", 2, loss=0.5)
    assert [each.step for each in read_history(path)] == [1, 2]
    path.write_text("words\n" + path.read_text())
    with pytest.raises(UserError, match=r"line 1 of .*history.jsonl is damaged"):
        read_history(path)


def test_the_log_and_warnings(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    with logged(history, tmp_path / "log.txt", lambda: 7):
        history.add("start", 0, steps=9, settings={}, environment={})
        history.add("unreadable", 1, image="a.jpg", reason="cut", part="training")
        history.add("validation", 5, weights="ema", figures={"bbox/AP": 0.25})
        logging.getLogger("sparkmim").warning("something %s", "odd")
        history.add("stop", 8)
    logging.getLogger("sparkmim").warning("outside")
    said = [line[21:] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert said == [
        "started: 9 steps in all", "unreadable image skipped: a.jpg: cut",
        "step 5  validation of the average: bbox/AP 0.25", "something odd",
        "stopped at step 8 on request; continue with --resume",
    ]  # fmt: skip
    warnings = [each for each in read_history(history.path) if each.kind == "warning"]  # type: ignore[arg-type]
    assert [(each.step, each.fields) for each in warnings] == [(7, {"message": "something odd"})]
