"""The report of a run: that it tells what the run's files hold, needs nothing beside it, and never spoils a run."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import re
from collections.abc import Sequence
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

import sparkmim
from sparkmim.cli import main
from sparkmim.drawing.charts import Curve, Line, draw_chart, running_mean, thinned
from sparkmim.runs.report import MOST_LINES, renew_report, write_report
from sparkmim.runs.run import PICTURES, Record, read_events

SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "decoder_width": 16, "batch_size": 8, "epochs": 2, "warmup_epochs": 1,
    "workers": 0, "log_every": 1, "picture_every": 1, "precision": "32-true",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would find in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self._inside = ""
        self.feed(self.source)
        self.close()

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


def write_events(run: Path, scalars: dict[str, dict[int, float]], pictures: dict[int, Tensor], at: float = 1e9) -> None:
    """Event files of a session that began at a time, a step per second."""
    writer = SummaryWriter(str(run / "tensorboard"))
    for tag, values in scalars.items():
        for step, value in values.items():
            writer.add_scalar(tag, value, step, walltime=at + step)
    for step, picture in pictures.items():
        writer.add_image(PICTURES, picture, step, walltime=at + step)
    writer.close()


LOSSES = {10 * i: 1.5 / i for i in range(1, 7)}
ENVIRONMENT = {
    "date": datetime.fromtimestamp(1e9).astimezone().isoformat(), "sparkmim": "0.1.0", "python": "3.11.2",
    "torch": "2.11.0", "torchvision": "0.26.0", "timm": "1.0.20", "lightning": "2.5", "platform": "Linux",
    "cpu": "Abacus 9000", "threads": 4, "memory_gib": 31.2, "gpus": [], "cuda": None, "processes": 1,
}  # fmt: skip


def write_run(run: Path, settings: dict[str, Any] | None = None, log: Sequence[str] = ()) -> Path:
    """A run folder without any training."""
    run.mkdir()
    known = {"data": "photos", "model": "resnet50", "image_size": [8, 16], "epochs": 6.0}
    (run / "config.yaml").write_text(yaml.safe_dump({**known, **(settings or {})}))
    if log:
        (run / "log.txt").write_text("".join(f"2001-09-09 01:46:40  {line}\n" for line in log))
    return run


def grid(images: int, step: int) -> Tensor:
    """A picture as training makes it, of 8 × 16 images whose grey tells image, column and step: `[3, H, W]`."""
    tones = 10 * torch.arange(images)[:, None] + torch.arange(3) + step  # [images, columns]
    return tones.to(torch.uint8).repeat_interleave(12, dim=0).repeat_interleave(20, dim=1).expand(3, -1, -1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished pretraining."""
    run = write_run(tmp_path / "run", log=["started: 60 steps in all", "epoch 6/6  step 60  loss 0.25"])
    scalars = {
        "loss": LOSSES,
        "learning_rate": {10 * i: 1e-5 * i for i in range(1, 7)},
        "weight_decay": {10 * i: 0.04 + 0.01 * i for i in range(1, 7)},
        "gradient_norm": {10 * i: 2.0 for i in range(1, 7)},
        "images_per_second": {10 * i: value for i, value in enumerate((100, 900, 1500, 1400, 1600, 1550), 1)},
        "epoch": {10 * i: float(i) for i in range(1, 7)},
    }
    write_events(run, scalars, {10 * i: grid(2, i) for i in range(1, 7)})
    (run / "environment.json").write_text(json.dumps([ENVIRONMENT]))
    return run


def test_it_tells_what_the_events_hold(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    page.check_that_it_asks_for_nothing()
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
    for (_, png), (column, step) in zip(strips.items(), found, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(png)))
        assert pixels.shape == (12, 40, 3)
        assert (pixels[:, :20] == column + step).all()
        assert (pixels[:, 20:] == 10 + column + step).all()


def test_large_pictures_become_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"image_size": [400, 300]})
    write_events(run, {}, {5: torch.rand(3, 404, 3 * 304)})
    strips = Page(write_report(run)).images("jpeg")
    assert [*strips] == ["Images: input", "Images: visible", "Images: step 5"]
    with Image.open(io.BytesIO(strips["Images: input"])) as strip:
        assert strip.size == (120, 160)


def test_a_run_that_was_killed_and_resumed(tmp_path: Path) -> None:
    """From step 30 on, another process did it again, on another day and machine; neither its pause nor what the first
    process did beyond its checkpoint counts."""
    run = write_run(tmp_path / "run", log=["started: 60 steps in all", "resumed: 60 steps in all",
                                           "stopped at step 55 on request; continue with --resume"])  # fmt: skip
    write_events(run, {"loss": {10: 1.0, 20: 0.9, 30: 0.8, 40: 7.0}}, {10: grid(1, 1), 40: grid(1, 7)})
    os.utime(next((run / "tensorboard").iterdir()), (1, 1))
    write_events(run, {"loss": {30: 0.7, 50: 0.6}}, {30: grid(1, 3)}, at=2e9)
    later = {"date": datetime.fromtimestamp(2e9).astimezone().isoformat(), "gpus": ["Slide Rule"] * 2, "processes": 2}
    (run / "environment.json").write_text(json.dumps([ENVIRONMENT, {**ENVIRONMENT, **later}]))
    curves, pictures = read_events(run / "tensorboard")
    assert curves["loss"].steps == [10, 20, 30, 50]
    assert curves["loss"].values == pytest.approx([1.0, 0.9, 0.7, 0.6])
    assert [picture.step for picture in pictures] == [10, 30]
    record = Record.of(run)
    assert record.seconds == 20 + 50
    assert record.state == "stopped at step 55 of 60"
    text = Page(write_report(run)).text
    assert "Resumed 2033-05-1" in text
    assert "2 × Slide Rule" in text
    assert text.count("Abacus 9000") == 1


def test_an_event_file_that_was_cut_off(run: Path) -> None:
    (file,) = (run / "tensorboard").iterdir()
    whole = read_events(run / "tensorboard")
    file.write_bytes(file.read_bytes()[:-10])
    cut = read_events(run / "tensorboard")
    assert cut[0] == whole[0]
    assert [picture.step for picture in cut[1]] == [picture.step for picture in whole[1][:-1]]


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "of_something_else.json").write_text('[{"protocol": 1, "rows": 2}]')
    page = Page(write_report(run))
    page.check_that_it_asks_for_nothing()
    assert page.headings == ["Settings"]
    assert "at step 0" in page.text
    assert not page.images("svg+xml")


def test_hostile_names(tmp_path: Path) -> None:
    """Names that are markup are shown as they are, wherever they come from."""
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    settings = {"data": evil, "model": f"net.py:{evil}", "init_weights": evil, "new_setting": evil, "precision": evil}
    run = write_run(tmp_path / "run", settings, ["started: 5 steps in all", f"unreadable image skipped: {evil}: cut"])
    write_events(run, {"loss": {1: 1.0}, evil: {1: 1.0, 2: 3.0}}, {})
    (run / "environment.json").write_text(json.dumps([{**ENVIRONMENT, "cpu": evil}]))
    scores = {"top1": 0.5, "top5": 1.0, "loss": 0.7, "per_class": {evil: 0.5}}
    (run / "metrics.json").write_text(json.dumps({"validation_images": 9, "best_model": scores}))
    page = Page(write_report(run))
    page.check_that_it_asks_for_nothing()
    assert page.headings == ["Training", "Validation", "Skipped images", "Settings", "Environment"]
    assert page.text.count("<script>alert(1)</script>") == 13
    assert page.source.count("<script") == 0
    assert all(alt.endswith("at the end") for alt in page.images("svg+xml"))


def test_skipped_images_are_named_up_to_a_number(tmp_path: Path) -> None:
    lines = [f"unreadable image skipped: {i:03}.jpg: truncated" for i in range(MOST_LINES + 10)]
    late = ["unreadable validation image left out: v.jpg: no image", *lines[:3]]
    page = Page(write_report(write_run(tmp_path / "run", log=[*lines, *late])))
    assert page.source.count("<details open>") == 0
    text = page.text
    assert f"{MOST_LINES + 11} images" in text
    assert f"{MOST_LINES - 1:03}.jpg: truncated" in text
    assert f"{MOST_LINES:03}.jpg" not in text
    assert "and 11 more" in text


def test_scores_of_a_classifier(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"layer_decay": 0.8})
    classes = {f"class {i:02}": i / 80 for i in range(60)}
    common = {"top5": 0.9, "loss": 0.5}
    content = {"last_model": {"top1": 0.51, "per_class": {}, **common}, "validation_images": 1234,
               "best_model": {"top1": 0.61, "per_class": {}, **common}, "classes": [*classes],
               "best_ema": {"top1": 0.71234, "per_class": classes, **common}}  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(content))
    write_events(run, {"val/top1": {5: 0.5, 9: 0.51}, "val/ema_top1": {5: 0.6, 9: 0.71234}, "val/top5": {5: 0.9}}, {})
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
        (lambda path: None, "run does not exist; name the run folder"),
        (lambda path: path.mkdir(), "run holds no run, for there is no config.yaml in it"),
        (lambda path: write_run(path, log=["x"]).joinpath("config.yaml").write_text("a: [1"), "cannot be read as"),
        (lambda path: write_run(path).joinpath("config.yaml").write_text("just words"), "cannot be read as"),
        (lambda path: write_run(path).joinpath("metrics.json").write_text("{"), "metrics.json is no whole JSON file"),
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
    with pytest.raises(ValueError, match=r"out is .*r\.pdf; it names a file that ends in \.html"):
        write_report(run, tmp_path / "r.pdf")
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
    page.check_that_it_asks_for_nothing()
    assert page.headings == ["Training", "Reconstructions", "Skipped images", "Settings", "Environment"]
    assert "finished" in page.text
    assert "broken.jpg" in page.text
    assert len(page.images("png")) == 2 + 2
    (now,) = json.loads((run / "environment.json").read_text())
    assert (now["torch"], now["threads"], now["processes"]) == (torch.__version__, torch.get_num_threads(), 1)
    assert now["cpu"] in page.text
    assert sum(curve.steps != [1, 2, 3, 4, 5, 6] for curve in Record.of(run).curves.values()) == 0

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
    assert "stopped at step 2 of 4" in text
    assert "A network from Python" in text
    assert "on a data set from Python" in text
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
    page.check_that_it_asks_for_nothing()
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
