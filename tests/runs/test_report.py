"""The report of a run: that it tells what the run's files hold, needs nothing beside it, and never spoils a run."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from runs_written import LOSSES, event, grid, start, write_png, write_run
from torch import Tensor, nn
from torch.utils.data import Dataset

import sparkmim
from sparkmim.cli import main
from sparkmim.drawing.charts import Curve, Line, draw_chart, running_mean, thinned
from sparkmim.runs.history import Event
from sparkmim.runs.report import MOST_LINES, renew_report, write_report
from sparkmim.runs.run import Run

SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "decoder_width": 16, "batch_size": 8, "epochs": 2, "warmup_epochs": 1,
    "workers": 0, "log_every": 1, "picture_every": 1, "precision": "32-true", "val_split": 0.0,
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would find in a file, which asks for nothing else."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(self.source)
        self.close()
        self.check_that_it_asks_for_nothing()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.styles.append(data)
        elif data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def headings(self) -> list[str]:
        return re.findall("<h2>(.*?)</h2>", self.source)

    def images(self, kind: str) -> dict[str, bytes]:
        """Content by alternative text."""
        start = f"data:image/{kind};base64,"
        found = [tag for name, tag in self.tags if name == "img" and tag["src"].startswith(start)]
        return {tag["alt"]: base64.b64decode(tag["src"].removeprefix(start)) for tag in found}

    def check_that_it_asks_for_nothing(self) -> None:
        policy = [tag["content"] for _, tag in self.tags if tag.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        for name, tag in self.tags:
            assert name not in ("script", "iframe", "object", "embed", "base", "form")
            assert tag.get("http-equiv", "").lower() != "refresh"
            for attribute, value in tag.items():
                assert not attribute.startswith("on")
                assert "url(" not in value
                if attribute in ("src", "href", "srcset", "action", "data", "poster", "background"):
                    assert value.startswith(("data:", "#")), value
        for style in self.styles:
            assert "url(" not in style
            assert "@import" not in style
        for svg in self.images("svg+xml").values():
            links = re.findall(r'(?:href|src)="([^"]*)"', svg.decode()) + re.findall(r"url\(([^)]*)\)", svg.decode())
            assert all(link.startswith("#") for link in links)


def validations(weights: str, top1: Mapping[int, float]) -> list[Event]:
    return [event("validation", step, weights=weights, figures={"top1": value}) for step, value in top1.items()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished pretraining."""
    speeds = (100, 900, 1500, 1400, 1600, 1550)
    steps = [
        event("step", 10 * i, epoch=float(i), loss=LOSSES[10 * i], learning_rate=1e-5 * i,
              weight_decay=0.04 + 0.01 * i, gradient_norm=2.0, images_per_second=speeds[i - 1])
        for i in range(1, 7)
    ]  # fmt: skip
    run = write_run(
        tmp_path / "run", events=[start(60), *steps], asked={"recipe": "paper", "epochs": None, "accelerator": "auto"}
    )
    for i in range(1, 7):
        write_png(run, grid(2, i), 10 * i)
    return run


def test_it_tells_what_the_events_hold(run: Path) -> None:
    page = Page(write_report(run))
    assert page.headings == ["Training", "Reconstructions", "Settings", "Environment"]
    for said in ("Pretraining", "resnet50", "finished", "6 of 6 epochs", "1.5 → 0.25", "1,450",
                 "1 min 0 s", "Abacus 9000", "4 threads", "31.2 GiB"):  # fmt: skip
        assert said in page.text
    charts = page.images("svg+xml")
    assert [alt.partition(" over")[0] for alt in charts] == [
        "Loss", "Learning rate", "Weight decay", "Gradient norm", "Images per second",
    ]  # fmt: skip
    assert "Loss over 60 steps: 1.5 at step 10, 0.25 at the end" in charts
    assert "Learning rate over 60 steps: 1e-05 at step 10, 6e-05 at the end" in charts
    svg = next(iter(charts.values())).decode()
    assert "system-ui" in svg
    assert "DejaVu" not in svg


def test_reconstructions_over_time(run: Path) -> None:
    """Inputs, what is visible, and five moments from the first to the last, each with the images side by side."""
    strips = Page(write_report(run)).images("png")
    assert [*strips][:2] == ["Images: input", "Images: visible"]
    assert [*strips][2:] == [f"Images: step {step}" for step in (10, 20, 30, 50, 60)]
    found = [(0, 1), (1, 1), *((2, moment) for moment in (1, 2, 3, 5, 6))]
    for png, (column, step) in zip(strips.values(), found, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(png)))
        assert pixels.shape == (12, 40, 3)
        assert (pixels[:, :20] == column + step).all()
        assert (pixels[:, 20:] == 10 + column + step).all()


def test_large_pictures_become_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"image_size": [400, 300]})
    write_png(run, torch.randint(256, (3, 404, 3 * 304), dtype=torch.uint8), 5)
    strips = Page(write_report(run)).images("jpeg")
    assert [*strips] == ["Images: input", "Images: visible", "Images: step 5"]
    with Image.open(io.BytesIO(strips["Images: input"])) as strip:
        assert strip.size == (120, 160)


def test_settings_tell_what_was_left_open(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    source = (run / "report.html").read_text()
    assert "<dt>epochs</dt><dd>6<small>recipe paper</small></dd>" in source
    assert "<dt>accelerator</dt><dd>cpu<small>this machine</small></dd>" in source
    assert "<dt>model</dt><dd>resnet50</dd>" in source


def test_a_picture_that_was_deleted(run: Path) -> None:
    next((run / "pictures").glob("*30.png")).unlink()
    assert [*Page(write_report(run)).images("png")][2:] == [f"Images: step {step}" for step in (10, 20, 50, 60)]


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "of_something_else.json").write_text('[{"protocol": 1, "rows": 2}]')
    page = Page(write_report(run))
    assert page.headings == ["Settings"]
    assert "at step 0" in page.text
    assert not page.images("svg+xml")


def test_hostile_names(tmp_path: Path) -> None:
    """Names that are markup are shown as they are, wherever they come from."""
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    settings = {"data": evil, "model": f"net.py:{evil}", "init_weights": evil, "new_setting": evil, "precision": evil}
    events = [
        start(5, settings, cpu=evil),
        event("unreadable", 1, image=evil, reason="cut", part="training"),
        event("step", 1, loss=1.0, **{evil: 1.0}),
        event("step", 2, **{evil: 3.0}),
    ]
    run = write_run(tmp_path / "run", settings, events)
    scores = {"top1": 0.5, "top5": 1.0, "loss": 0.7, "per_class": {evil: 0.5}}
    (run / "metrics.json").write_text(json.dumps({"validation_images": 9, "best_model": scores}))
    page = Page(write_report(run))
    assert page.headings == ["Training", "Validation", "Skipped images", "Settings", "Environment"]
    assert page.text.count("<script>alert(1)</script>") == 13
    assert page.source.count("<script") == 0
    assert all(alt.endswith("at the end") for alt in page.images("svg+xml"))


def test_skipped_images_are_named_up_to_a_number(tmp_path: Path) -> None:
    names = [*range(MOST_LINES + 10), *range(3)]  # some in several epochs
    events = [event("unreadable", 1, image=f"{i:03}.jpg", reason="truncated", part="training") for i in names]
    events.append(event("unreadable", 1, image="v.jpg", reason="no image", part="validation"))
    page = Page(write_report(write_run(tmp_path / "run", events=[start(9), *events])))
    assert page.source.count("<details open>") == 0
    for said in (f"{MOST_LINES + 11} images", f"{MOST_LINES - 1:03}.jpg: truncated", "and 11 more"):
        assert said in page.text
    assert f"{MOST_LINES:03}.jpg" not in page.text


def test_scores_of_a_classifier(tmp_path: Path) -> None:
    scores = validations("model", {5: 0.5, 9: 0.51}) + validations("ema", {5: 0.6, 9: 0.71234})
    run = write_run(tmp_path / "run", {"layer_decay": 0.8}, [start(9, {"layer_decay": 0.8}), *scores])
    classes = {f"class {i:02}": i / 80 for i in range(60)}
    common = {"top5": 0.9, "loss": 0.5}
    content = {"last_model": {"top1": 0.51, "per_class": {}, **common}, "validation_images": 1234,
               "best_model": {"top1": 0.61, "per_class": {}, **common}, "classes": [*classes],
               "best_ema": {"top1": 0.71234, "per_class": classes, **common}}  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(content))
    Image.new("RGB", (7, 5)).save(run / "confusion.png")
    page = Page(write_report(run))
    for said in ("Fine-tuning", "71.2%", "71.23%", "61.00%", "51.00%", "on 1,234 images", "model", "average",
                 "class 00 0.0%", "and 10 classes from 62.5% on"):  # fmt: skip
        assert said in page.text
    assert [*page.images("svg+xml")] == ["Validation top-1 over 9 steps: 50.0% at step 5, 51.0% at the end"]
    with Image.open(io.BytesIO(page.images("png")["Confusion matrix of the best weights"])) as picture:
        assert picture.size == (7, 5)


def test_curves_keep_their_peaks_and_their_ends() -> None:
    values = np.sin(np.arange(5000) / 50)
    values[1234], values[4321], values[7] = 9.0, -9.0, np.nan
    curve = Curve(list(range(0, 50000, 10)), values.tolist(), [0.0] * 5000)
    steps, kept = thinned(curve)
    assert len(steps) <= 1000
    assert (np.diff(steps) > 0).all()
    assert (steps[0], steps[-1]) == (0, 49990)
    assert (kept.max(), kept.min()) == (9.0, -9.0)
    assert dict(zip(steps, kept, strict=True))[12340] == 9.0
    line = Curve(curve.steps, (3.0 * np.arange(5000)).tolist(), curve.times)
    np.testing.assert_allclose(running_mean(line).values, line.values, rtol=1e-9)  # a line is its own running mean
    bump = running_mean(Curve(list(range(200)), [0.0] * 100 + [9.0] + [0.0] * 99, [0.0] * 200)).values
    assert bump[100] == bump[96] == bump[104] == 1.0
    assert bump[95] == bump[105] == 0.0


@pytest.mark.parametrize(
    ("values", "form", "ticks"),
    [
        ([0.0, 2e-4], "number", {"0.0", "0.5", "1.0", "1.5", "2.0", "×10⁻⁴"}),
        ([-1.0, 1.0], "number", {"−1.0", "0.0", "0.5"}),
        ([0.5, 0.75], "share", {"50%", "60%", "70%"}),
        ([10.0, 2500.0], "count", {"0", "1,000", "2,000"}),
    ],
)
def test_axes_are_written_for_people(values: list[float], form: Any, ticks: set[str]) -> None:
    svg = draw_chart([Line(Curve([0, 20000], values, [0.0, 1.0]))], form)
    written = set(re.findall(r">([^<>\n]+)</text>", svg))
    assert ticks <= written
    assert {"step", "10k", "20k"} <= written


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "run does not exist; --run names the run folder of a training"),
        (lambda path: path.mkdir(), "run is an empty folder; --run names the run folder of a training"),
        (lambda path: write_run(path).joinpath("config.yaml").write_text("a: [1"), "cannot be read as"),
        (lambda path: write_run(path).joinpath("metrics.json").write_text("{"), "metrics.json is no whole JSON file"),
        (lambda path: write_run(path).joinpath("history.jsonl").write_text("{}\n{}\n"), "line 1 of run/history.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence(
    make: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run")
    with pytest.raises(SystemExit) as leaving:
        main(["report", "run"])
    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run" / "report.html").exists()


def test_out_is_an_html_file(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out is .*r\.pdf; its name ends in \.html or \.htm"):
        sparkmim.report(run, out=tmp_path / "r.pdf")
    result = sparkmim.report(run, out=tmp_path / "new" / "r.html")
    assert result.out.read_text() == write_report(run).read_text()
    assert write_report(run).read_text() == result.out.read_text()  # again, over the old one


# With real runs


class StopAt(pl.Callback):
    """Asks the run to stop after a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), 15)


def test_a_run_ends_with_its_report(
    photos: Path, network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "part0" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    run = tmp_path / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    main(["pretrain", "--data", str(photos), "--out", str(run), "--model", network, *flags])
    assert capsys.readouterr().err.splitlines()[-1] == f"report: {run / 'report.html'}"
    page = Page(run / "report.html")
    assert page.headings == ["Training", "Reconstructions", "Skipped images", "Settings", "Environment"]
    assert "finished" in page.text
    assert "broken.jpg" in page.text
    assert len(page.images("png")) == 2 + 2
    (now,) = json.loads((run / "environment.json").read_text())
    assert (now["torch"], now["threads"], now["processes"]) == (torch.__version__, torch.get_num_threads(), 1)
    assert now["cpu"] in page.text
    assert sum(curve.steps != [1, 2, 3, 4, 5, 6] for curve in Run.read(run).curves.values()) == 0

    main(["evaluate", "--data", str(photos), "--weights", str(run), "--val-split", "0.5", "--workers", "0"])
    text = Page(run / "report.html").text
    found = json.loads((run / "evaluation" / "knn.json").read_text())["rows"]
    assert "Evaluation Accuracy, k-NN network stage 1" in text
    assert all(f"{row['accuracy']:.1%}" in text for row in found)


class Arrays(Dataset[Tensor]):
    """Arrays of one shape, in units of their own."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return 50 * torch.randn(self.shape, generator=torch.Generator().manual_seed(index))


@pytest.mark.parametrize(("rank", "pictures"), [(1, False), (3, True)])
def test_signals_and_volumes_from_python(tmp_path: Path, rank: int, pictures: bool) -> None:
    convolution = {1: nn.Conv1d, 3: nn.Conv3d}[rank]
    network = nn.Sequential(convolution(2, 8, 3, 2, padding=1), nn.ReLU(), convolution(8, 16, 2, 2))
    settings = {**SMALL, "data": Arrays(2, *(16,) * rank), "model": copy.deepcopy(network), "channels": 2,
                "image_size": [16] * rank, "out": tmp_path / "run"}  # fmt: skip
    stopped = sparkmim.pretrain(**settings, callbacks=[StopAt(2)])
    assert not stopped.finished
    text = Page(tmp_path / "run" / "report.html").text
    for said in ("stopped at step 2 of 4", "A network from Python", "on a data set from Python"):
        assert said in text
    sparkmim.pretrain(out=tmp_path / "run", data=settings["data"], model=network, resume=True)
    page = Page(tmp_path / "run" / "report.html")
    assert ("Reconstructions" in page.headings) == pictures
    assert "finished" in page.text
    assert "Resumed" in page.text
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())) == 2


class Labels(Arrays):
    """Small pictures of two classes."""

    classes = ("dark", "bright")
    targets = (0, 1) * 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return (super().__getitem__(index) + 100 * (index % 2)).clamp(0, 255).to(torch.uint8), index % 2


def test_fine_tuning_ends_with_its_report(network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = Labels(3, 16, 16)
    result = sparkmim.finetune(
        data=images, val_data=images, out=tmp_path / "run", model=network, image_size=16, epochs=2, batch_size=8,
        workers=0, log_every=1, ema=0.5, precision="32-true",
    )  # fmt: skip
    assert capsys.readouterr().err.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    page = Page(tmp_path / "run" / "report.html")
    assert page.headings == ["Training", "Validation", "Settings", "Environment"]
    assert f"{max(result.best_top1.values()):.1%}" in page.text
    assert "bright" in page.text
    assert "Confusion matrix of the best weights" in page.images("png")


def test_a_report_that_fails_leaves_the_run_whole(
    photos: Path, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("sparkmim.runs.report._charts", fail)
    result = sparkmim.pretrain(**SMALL, data=str(photos), model=network, out=tmp_path / "run")
    assert result.finished
    assert f"the report could not be written: no space left; try `sparkmim report {tmp_path / 'run'}`" in caplog.text
    assert not list((tmp_path / "run").glob("report*"))
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path / "run")
    assert renew_report(tmp_path / "run") is None
