"""Probes of frozen features while a network is pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sparkmim
from sparkmim.runs.history import Event, read_history

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two classes of 12 images: dark ones and bright ones."""
    folder = tmp_path / "labelled"
    for place, name in enumerate(("dark", "bright")):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            Image.new("RGB", (40, 40), (20 + 200 * place, 5 * index, 90)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def settings(small_pretraining: dict[str, Any], labelled: Path) -> dict[str, Any]:
    return small_pretraining | {"probe": str(labelled), "picture_every": 0}


def probes(out: Path) -> list[Event]:
    return [event for event in read_history(out / "history.jsonl") if event.kind == "probe"]


def test_probes_at_intervals(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    sparkmim.pretrain(**settings, out=out, probe_every=2, ema=0.9)
    found = probes(out)
    assert [(event.step, event.fields["weights"]) for event in found] == [
        (step, weights) for step in (0, 6, 12) for weights in ("model", "ema")
    ]
    for event in found:
        assert set(event.fields["figures"]) == {"linear", "knn", "linear_2", "knn_2"}
        assert event.fields["start"] == found[0].fields["figures"]
        assert event.fields["seconds"] > 0
    assert found[-1].fields["figures"]["linear"] == 1  # brightness is easily told
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("probe/linear")] == [0, 6, 12]
    assert events.Scalars("probe/ema_knn_2")[-1].value == pytest.approx(found[-1].fields["figures"]["knn_2"])
    assert "probe: linear" in (out / "log.txt").read_text()
    assert "Linear probe" in (out / "report.html").read_text()


def test_figures_are_those_of_evaluate(settings: dict[str, Any], labelled: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / "parts" / name).mkdir(parents=True)
        for path in labelled.rglob("*.png"):
            if (int(path.stem) % 3 == 0) == (name == "test"):
                target = tmp_path / "parts" / name / path.parent.name / path.name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
    parts = tmp_path / "parts"
    sparkmim.pretrain(**{**settings, "probe": str(parts)}, out=tmp_path / "run")
    figures = probes(tmp_path / "run")[-1].fields["figures"]
    for protocol in ("knn", "linear"):
        result = sparkmim.evaluate(data=str(parts), weights=tmp_path / "run", protocol=protocol)  # type: ignore[arg-type]
        rows = [row for row in result.rows if row.network == "weights"]
        assert [figures[protocol], figures[f"{protocol}_2"]] == [rows[-1].accuracy, rows[-2].accuracy]


def test_probes_change_nothing_of_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    sparkmim.pretrain(**settings, out=tmp_path / "probed", probe_every=1)
    sparkmim.pretrain(**{**settings, "probe": None}, out=tmp_path / "plain")
    one, two = (load_file(tmp_path / run / "weights" / "spark.safetensors") for run in ("probed", "plain"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_no_more_often_than_their_time_allows(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe of 1 second, and steps of 1.5 seconds: the next is due 19 seconds after it ended, at an epoch's end."""
    now = 0.0

    class Clock(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            nonlocal now
            now += 1.5

    def clock() -> float:
        return now

    def features(*_: Any) -> Any:
        nonlocal now
        now += 0.5  # of images to learn from, and to test on
        return original(*_)

    from sparkmim.training import probing

    original = probing.Probe._features
    monkeypatch.setattr(probing.Probe, "_features", features)
    monkeypatch.setattr(probing.time, "perf_counter", clock)
    sparkmim.pretrain(**{**settings, "epochs": 12}, out=tmp_path / "run", callbacks=[Clock()])
    assert [event.step for event in probes(tmp_path / "run")] == [0, 15, 30, 36]


def test_best_weights_by_probe_and_by_loss(settings: dict[str, Any], tmp_path: Path) -> None:
    for by in ("probe", "val_loss"):
        out = tmp_path / by
        sparkmim.pretrain(**{**settings, "val_split": 0.25}, out=out, probe_every=1, keep_best=by)  # type: ignore[arg-type]
        assert (out / "weights" / "spark_best.safetensors").is_file()
    events = [event for event in read_history(tmp_path / "val_loss" / "history.jsonl") if event.kind == "validation"]
    best = min(events, key=lambda event: event.fields["figures"]["loss"])
    kept = sparkmim.interop.weights.open_weights(tmp_path / "val_loss" / "weights" / "spark_best.safetensors")
    assert kept.metadata.figures == best.fields["figures"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"keep_best": "probe", "probe": None},
            "keep_best is probe, but there is none; name labelled images",
        ),
        ({"keep_best": "val_loss"}, "keep_best is val_loss, but no images are held out; name some with --val-data"),
        ({"probe": "nowhere"}, "nowhere does not exist; --probe names"),
        ({"probe_every": 0}, "probe_every is 0; it must be above 0"),
    ],
)
def test_mistakes(settings: dict[str, Any], tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sparkmim.pretrain(**{**settings, **changed}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
