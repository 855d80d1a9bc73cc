"""The report of a run: one HTML file that needs nothing beside it, and asks nothing of the network."""

from __future__ import annotations

import base64
import io
import logging
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from sparkmim._version import __version__
from sparkmim.data.problems import counted
from sparkmim.drawing.charts import Curve, Form, Line, draw_chart, running_mean
from sparkmim.drawing.figures import ACCENT, CONTRAST, QUIET, THIRD
from sparkmim.drawing.pixels import GAP
from sparkmim.files import replacing
from sparkmim.results import EvaluationResult, Score
from sparkmim.runs.config import ONCE, decided_by
from sparkmim.runs.folder import RunFolder
from sparkmim.runs.run import Run
from sparkmim.terminal import printable

log = logging.getLogger("sparkmim")

MOMENTS = 5
"""Number of reconstructions over time."""

MOST_LINES = 50
"""Most skipped images, and most classes, that are listed."""

_FEW = 10  # longer lists of skipped images are folded
_TILE = 160  # largest side of an image among the reconstructions, in pixels
_SMALL = 96  # images up to this side are shown pixel by pixel


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a run, finished or not, by default to `report.html` in its folder; returns the path."""
    path = RunFolder(run).report if out is None else Path(out)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    page = environment.get_template("report.html.jinja").render(_page(Run.read(run)))
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def _printable(value: Any) -> Any:
    """Makes text printable that goes into the page; markup of the page's own stays."""
    return printable(value) if type(value) is str else value


def renew_report(run: str | Path) -> Path | None:
    """Writes the report at the end of another task; logs a failure instead of raising it, and returns None."""
    try:
        return write_report(run)
    except Exception as error:
        log.warning("the report could not be written: %s; try `sparkmim report %s`", error, run)
        return None


# What the template shows: names and values as text, pictures as data URIs.


@dataclass(frozen=True)
class Entry:
    """A name and a value, with a note in small print."""

    name: str
    value: str
    note: str = ""


def _page(run: Run) -> dict[str, Any]:
    model = str(run.settings.get("model")).rpartition(":")[2]  # the network's name, or that of its factory
    return {
        "network": "A network from Python" if "model" in run.objects else printable(model),
        "kind": _kind(run),
        "data": run.asked.get("data"),
        "data_from_python": "data" in run.objects,
        "began": f"{run.started.day} {run.started:%B %Y}",
        "summary": _summary(run),
        "charts": _charts(run),
        "strips": _strips(run),
        "validation": _validation(run),
        "evaluations": [_evaluation(found) for found in run.evaluations],
        "skipped": _skipped(run.unreadable),
        "settings": _settings(run),
        "environment": _environment(run.sessions),
        "version": __version__,
        "folder": run.folder.path,
    }


_KINDS = {"box_head": "Detection", "reduce_labels": "Segmentation", "layer_decay": "Fine-tuning"}
"""Kinds of training, by a setting that neither those further down nor pretraining have."""


def _kind(run: Run) -> str:
    return next((kind for setting, kind in _KINDS.items() if setting in run.settings), "Pretraining")


# Summary


def _summary(run: Run) -> list[Entry]:
    entries = [Entry("State", run.state, _epochs(run))]
    if scores := _best(run):
        entries.append(Entry("Best top-1", f"{scores['top1']:.1%}", f"top-5 {scores['top5']:.1%}"))
    if loss := run.curves.get("loss"):
        note = f"{_BEST_GUESS:g} is the mean of each patch" if _kind(run) == "Pretraining" else ""
        entries.append(Entry("Loss, first to last", f"{loss.values[0]:.4g} → {loss.values[-1]:.4g}", note))
    if (held_out := run.curves.get("val/loss")) and _kind(run) == "Pretraining":
        ends = f"{held_out.values[0]:.4g} → {held_out.values[-1]:.4g}"
        entries.append(Entry("Held-out loss", ends, "on images that it was not trained on"))
    if probe := run.curves.get("probe/linear"):
        ends = f"{probe.values[0]:.1%} → {probe.values[-1]:.1%}"
        entries.append(Entry("Linear probe", ends, "frozen features, before the first step and last"))
    if speed := run.curves.get("images_per_second"):
        median = statistics.median(speed.values)
        entries.append(Entry("Images per second", f"{median:,.0f}" if median >= 10 else f"{median:.2g}", "median"))
    if run.seconds is not None:
        entries.append(Entry("Duration", _duration(run.seconds)))
    return [*entries, _devices(run)]


def _epochs(run: Run) -> str:
    epochs = run.curves.get("epoch")
    if epochs is None:
        return ""
    whole = run.settings.get("epochs")
    return f"{epochs.values[-1]:.4g} epochs" if whole is None else f"{epochs.values[-1]:.4g} of {whole:g} epochs"


def _duration(seconds: float) -> str:
    """Writes a duration in its two largest units."""
    whole = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole} s"


def _devices(run: Run) -> Entry:
    if not run.sessions:
        return Entry("Devices", str(run.settings.get("accelerator", "not known")))
    now, processes = run.sessions[-1], run.sessions[-1]["processes"]
    if now["gpus"]:
        return Entry("Devices", f"{processes} × {now['gpus'][0]}")
    threads = counted(now["threads"], "thread")
    return Entry("Devices", str(now["cpu"]), f"{processes} processes × {threads}" if processes > 1 else threads)


# Curves

_CHARTS: dict[str, tuple[Form, dict[str, str]]] = {
    "Loss": ("number", {"loss": ""}),
    "Validation top-1": ("share", {"val/top1": "model", "val/ema_top1": "average"}),
    "Validation loss": ("number", {"val/loss": "model", "val/ema_loss": "average"}),
    "Learning rate": ("number", {"learning_rate": ""}),
    "Weight decay": ("number", {"weight_decay": ""}),
    "Gradient norm": ("number", {"gradient_norm": ""}),
    "Images per second": ("count", {"images_per_second": ""}),
}
"""Form of the values, and labels by the name of the curve, by title."""

_PRETRAINING_CHARTS: dict[str, tuple[Form, dict[str, str]]] = {
    "Loss": ("number", {"loss": "training", "val/loss": "held out", "val/ema_loss": "held out, average"}),
    "Contrastive loss": ("number", {"contrast": ""}),
    "Linear probe": ("share", {
        "probe/linear": "deepest map", "probe/linear_2": "the next", "probe/ema_linear": "deepest map, average",
    }),
    "k-NN of frozen features": ("share", {
        "probe/knn": "deepest map", "probe/knn_2": "the next", "probe/ema_knn": "deepest map, average",
    }),
}  # fmt: skip
"""Charts of pretraining that differ: both losses are of the same kind."""

_BEST_GUESS = 1.0
"""Loss of the best constant guess in pretraining: the mean of each patch."""

_SMOOTHED = {"loss", "contrast", "gradient_norm", "images_per_second"}
_NO_CHARTS = {"epoch", "hp_metric", "val/top5", "val/ema_top5", "probe/ema_linear_2", "probe/ema_knn_2"}


@dataclass(frozen=True)
class Chart:
    """A chart, its key, and a description of its main curve."""

    title: str
    lines: list[Line]
    image: str
    said: str


def _charts(run: Run) -> list[Chart]:
    pretraining = _kind(run) == "Pretraining"
    charts = dict(_PRETRAINING_CHARTS) if pretraining else {}
    drawn = {name for _, names in charts.values() for name in names}
    charts.update({title: chart for title, chart in _CHARTS.items() if not drawn & chart[1].keys()})
    known = _NO_CHARTS.union(*(names for _, names in charts.values()))
    charts.update({name: ("number", {name: ""}) for name in run.curves if name not in known})
    found = []
    for title, (form, names) in charts.items():
        curves = {name: run.curves[name] for name in names if name in run.curves}
        curves = {name: curve for name, curve in curves.items() if any(map(math.isfinite, curve.values))}
        if curves and not (title == "Weight decay" and len(set(curves["weight_decay"].values)) == 1):
            found.append(_chart(title, form, curves, names, _BEST_GUESS if pretraining and title == "Loss" else None))
    return found


def _chart(
    title: str, form: Form, curves: dict[str, Curve], labels: dict[str, str], reference: float | None = None
) -> Chart:
    lines: list[Line] = []
    if reference is not None:
        steps = [min(curve.steps[0] for curve in curves.values()), max(curve.steps[-1] for curve in curves.values())]
        lines.append(Line(Curve(steps, [reference] * 2, [0.0] * 2), "mean of each patch", QUIET, faint=True))
    for (name, curve), colour in zip(curves.items(), (ACCENT, CONTRAST, THIRD), strict=False):
        label = labels[name] if len(labels) > 1 else ""
        smooth = running_mean(curve) if name in _SMOOTHED else curve
        if smooth.values != curve.values:
            lines += [Line(curve, "as logged", colour, faint=True), Line(smooth, label or "running mean", colour)]
        else:
            lines.append(Line(curve, label, colour))
    curve = next(iter(curves.values()))
    ends = [f"{value:.1%}" if form == "share" else f"{value:.4g}" for value in (curve.values[0], curve.values[-1])]
    said = f"{title} over {curve.steps[-1]:,} steps: {ends[0]} at step {curve.steps[0]:,}, {ends[1]} at the end"
    return Chart(title, lines, _data_uri("svg+xml", draw_chart(lines, form).encode()), said)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# Reconstructions


@dataclass(frozen=True)
class Strip:
    """Images side by side, encoded; `small` ones are shown pixel by pixel."""

    name: str
    note: str
    image: str
    width: int
    height: int
    small: bool


def _strips(run: Run) -> list[Strip]:
    """Returns inputs, what the network saw of them, and reconstructions at several steps."""
    pictures = run.pictures
    last = len(pictures) - 1
    chosen = sorted({round(place * last / (MOMENTS - 1)) for place in range(MOMENTS)}) if pictures else []
    epochs = run.curves.get("epoch")
    strips: list[Strip] = []
    size = run.settings.get("image_size")
    for picture in (pictures[place] for place in chosen):
        png = run.png(picture)
        columns = _columns(png, size) if png and size else None
        if columns is None:
            continue
        if not strips:
            strips += [_strip("input", "", columns[0]), _strip("visible", "to the network", columns[1])]
        epoch = f"epoch {picture.step * epochs.values[-1] / epochs.steps[-1]:.4g}" if epochs else ""
        strips.append(_strip(f"step {picture.step:,}", epoch, columns[2]))
    return strips


def _strip(name: str, note: str, image: Image.Image) -> Strip:
    small = min(image.size) <= _SMALL
    kind = "png" if small else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"optimize": True} if small else {"quality": 88}))
    return Strip(name, note, _data_uri(kind, buffer.getvalue()), *image.size, small)


def _columns(png: bytes, image_size: Sequence[int]) -> list[Image.Image] | None:
    """Lays each column of a grid of inputs, masked inputs and reconstructions in a row; None for other pictures."""
    height, width = (size + 2 * GAP for size in image_size[-2:])
    with Image.open(io.BytesIO(png)) as opened:
        grid = opened.convert("RGB")
    rows, left_over = divmod(grid.height, height)
    if left_over or grid.width != 3 * width:
        return None
    strips = []
    for column in range(3):
        strip = Image.new("RGB", (rows * width, height))
        for row in range(rows):
            box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
            strip.paste(grid.crop(box), (row * width, 0))
        scale = min(1.0, _TILE / max(width, height))
        if scale < 1:
            strip = strip.resize((round(strip.width * scale), round(strip.height * scale)), Image.Resampling.LANCZOS)
        strips.append(strip)
    return strips


# Scores


def _best(run: Run) -> dict[str, Any] | None:
    """Returns the scores of the best weights, averaged or not."""
    metrics = run.metrics or {}
    scores = [metrics[name] for name in ("best_model", "best_ema") if name in metrics]
    return max(scores, key=lambda found: float(found["top1"]), default=None)


def _validation(run: Run) -> dict[str, Any] | None:
    best, metrics = _best(run), run.metrics
    if best is None or metrics is None:
        return None
    names = {"best_model": "best", "last_model": "last", "best_ema": "best average", "last_ema": "last average"}
    scores = [(label, metrics[name]) for name, label in names.items() if metrics.get(name)]
    rows = [(label, f"{row['top1']:.2%}", f"{row['top5']:.2%}", f"{row['loss']:.4g}") for label, row in scores]
    worst_first = sorted(best["per_class"].items(), key=lambda item: item[1])
    rest = worst_first[MOST_LINES:]
    more = f"and {counted(len(rest), 'class', 'classes')} from {rest[0][1]:.1%} on, in metrics.json" if rest else ""
    confusion = None
    path = run.folder.path / "confusion.png"
    if path.is_file():
        with Image.open(path) as picture:
            confusion = {"image": _data_uri("png", path.read_bytes()), "width": picture.width, "height": picture.height}
    images = counted(metrics["validation_images"], "image")
    return {"rows": rows, "images": images, "classes": worst_first[:MOST_LINES], "more": more, "confusion": confusion}


def _evaluation(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the table that `sparkmim evaluate` prints, and the data it was measured on."""
    rows = [Score(**row) for row in found["rows"]]
    table = EvaluationResult(found["protocol"], rows, found["classes"], [], None).table()
    train, classes = counted(found["images"]["train"], "image"), counted(len(found["classes"]), "class", "classes")
    test = f"{found['images']['test']:,}"
    return {
        "name": str(table.title).removesuffix(" accuracy"),
        "heads": [str(column.header) for column in table.columns],
        "rows": zip(*(map(str, column.cells) for column in table.columns), strict=True),
        "said": f"Frozen features, {train} of {classes} to learn from, {test} to test on; {found['method']}.",
    }


def _skipped(unreadable: list[str]) -> dict[str, Any] | None:
    if not unreadable:
        return None
    more = len(unreadable) - MOST_LINES
    lines = unreadable[:MOST_LINES] + ([f"and {more:,} more, in log.txt"] if more > 0 else [])
    return {"count": counted(len(unreadable), "image"), "open": len(unreadable) <= _FEW, "lines": lines}


# Settings and environment


_GROUPS = {
    "Data": (
        "data", "val_data", "val_split", "image_size", "channels", "mean", "std", "max_unreadable", "crop_scale",
        "flip", "jitter", "augment", "erase", "mixup", "cutmix", "smoothing", "repeats", "eval_crop", "probe",
    ),
    "Network": (
        "model", "weights", "init_weights", "freeze", "stages", "feature_modules", "patch_size", "mask_ratio",
        "decoder", "decoder_width", "drop_path",
    ),
    "Optimisation": (
        "recipe", "epochs", "iterations", "batch_size", "accumulate", "optimizer", "learning_rate", "layer_decay",
        "warmup_epochs", "warmup_iterations", "beta1", "beta2", "weight_decay", "weight_decay_end", "clip_grad",
        "loss", "contrast", "ema", "seed",
    ),
    "Machine and files": (
        "out", "accelerator", "devices", "num_nodes", "precision", "channels_last", "checkpoint_gradients", "compile",
        "workers", "save_minutes", "max_minutes", "keep_best", "keep_every", "loggers", "log_every", "picture_every",
        "probe_every", "eval_every",
    ),
}  # fmt: skip


def _settings(run: Run) -> list[tuple[str, list[Entry]]]:
    """Returns the settings by group."""
    shown = {name: value for name, value in run.settings.items() if name not in ONCE}
    named = {name for names in _GROUPS.values() for name in names}
    groups = {**_GROUPS, "Others": tuple(name for name in shown if name not in named)}
    found = [(title, [_setting(run, name) for name in names if name in shown]) for title, names in groups.items()]
    return [(title, entries) for title, entries in found if entries]


def _setting(run: Run, name: str) -> Entry:
    value = run.settings[name]
    if name in run.objects:
        return Entry(name, "a Python object")
    return Entry(name, _plain(value), decided_by(name, run.asked.get(name, value), value, run.asked.get("recipe")))


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


_ENVIRONMENT = {
    "sparkmim": "sparkmim", "python": "Python", "torch": "PyTorch", "torchvision": "torchvision", "timm": "timm",
    "lightning": "Lightning", "cuda": "CUDA", "platform": "platform", "cpu": "CPU", "threads": "threads per process",
    "memory_gib": "memory", "gpus": "GPUs", "processes": "processes",
}  # fmt: skip


def _environment(sessions: list[dict[str, Any]]) -> list[tuple[str, list[Entry]]]:
    """Returns the environment of the start, and what was different at each resumption."""
    groups = []
    for place, session in enumerate(sessions):
        before = sessions[place - 1] if place else {}
        date = str(session["date"])[:16].replace("T", " ")
        entries = [
            Entry(label, _measured(name, value))
            for name, label in _ENVIRONMENT.items()
            if (value := session.get(name)) not in (None, []) and value != before.get(name)
        ]
        groups.append((f"{'Resumed' if place else 'Started'} {date}", entries))
    return groups


def _measured(name: str, value: Any) -> str:
    if name == "memory_gib":
        return f"{value} GiB"
    if name == "gpus":
        return ", ".join(f"{count} × {gpu}" for gpu, count in Counter(value).items())
    return _plain(value)
