"""The report of a run: one HTML file that needs nothing beside it, and asks nothing of the network."""

from __future__ import annotations

import base64
import io
import logging
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from sparkmim._version import __version__
from sparkmim.drawing.charts import Curve, Form, Line, draw_chart, running_mean
from sparkmim.drawing.figures import ACCENT, CONTRAST
from sparkmim.drawing.pixels import GAP
from sparkmim.errors import UserError
from sparkmim.files import replacing
from sparkmim.results import EvaluationResult, Score
from sparkmim.runs.folder import RunFolder
from sparkmim.runs.run import Picture, Record

log = logging.getLogger("sparkmim")

MOMENTS = 5
"""How many of the reconstructions over time are shown."""

MOST_LINES = 50
"""Of skipped images and of classes; the rest is counted."""

_FEW = 10
"""Up to this many lines need no folding."""

_TILE = 160
"""Pixels of an image's longer side among the reconstructions, at most."""

_SMALL = 96
"""Up to this longer side, images are shown pixel by pixel."""


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a run, which may be finished, stopped or at work; a part that there is nothing of is left
    out.

    Args:
        run: run folder of pretraining or fine-tuning.
        out: HTML file, replaced if it is there; None for `report.html` in the run folder.

    Returns:
        where it is.

    Raises:
        ValueError: if that is no run folder, a file in it is damaged, or out is no HTML file.
    """
    path = RunFolder(run).report if out is None else Path(out)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UserError(f"out is {path}; it names a file that ends in .html")
    page = _page(Record.of(run))
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def renew_report(run: str | Path) -> Path | None:
    """The same at the end of something else, which it must not spoil: a failure is a line in the log, and None."""
    try:
        return write_report(run)
    except Exception as error:
        log.warning("the report could not be written: %s; try `sparkmim report %s`", error, run)
        return None


# The page

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content-Security-Policy: even a mistake here could not make the page ask for anything."""


def _page(record: Record) -> str:
    network, kind, data = _network(record), _kind(record), _data(record)
    began = f"{record.started.day} {record.started:%B %Y}"
    sections = [
        _section("Training", _charts(record)),
        _section("Reconstructions", _moments(record)),
        _section("Validation", _validation(record)),
        _section("Evaluation", "".join(_evaluation(found) for found in record.evaluations)),
        _section("Skipped images", _skipped(record.unreadable)),
        _section("Settings", _settings(record)),
        _section("Environment", _environment(record.sessions)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(network)}: {kind.lower()}</title>
<link rel="icon" href="data:,">
<style>
{Path(__file__).with_suffix(".css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<p class="kind">{kind}</p>
<h1>{escape(network).replace("_", "_<wbr>").replace(".", ".<wbr>")}</h1>
<p class="soft">{data}{began}</p>
{_summary(record)}
</header>
<main>
{"".join(sections)}</main>
<footer>sparkmim {escape(__version__)} · run folder <code>{escape(str(record.folder.path))}</code></footer>
</body>
</html>
"""


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>\n" if content else ""


_KINDS = {"box_head": "Detection", "reduce_labels": "Segmentation", "layer_decay": "Fine-tuning"}
"""Kinds of training, by a setting that those further down and pretraining do not have."""


def _kind(record: Record) -> str:
    return next((kind for setting, kind in _KINDS.items() if setting in record.settings), "Pretraining")


def _network(record: Record) -> str:
    """The network's name; of one from a file, that of its factory."""
    if "model" in record.objects:
        return "A network from Python"
    return str(record.settings.get("model")).rpartition(":")[2]


def _data(record: Record) -> str:
    if "data" in record.objects:
        return "on a data set from Python, "
    data = record.settings.get("data")
    return f"on <code>{escape(str(data))}</code>, " if data else ""


# Summary


def _summary(record: Record) -> str:
    entries = [("State", record.state, _epochs(record))]
    if scores := _best(record):
        entries.append(("Best top-1", f"{scores['top1']:.1%}", f"top-5 {scores['top5']:.1%}"))
    if loss := record.curves.get("loss"):
        entries.append(("Loss, first to last", f"{loss.values[0]:.4g} → {loss.values[-1]:.4g}", ""))
    if speed := record.curves.get("images_per_second"):
        median = statistics.median(speed.values)
        entries.append(("Images per second", f"{median:,.0f}" if median >= 10 else f"{median:.2g}", "median"))
    if record.seconds is not None:
        entries.append(("Duration", _duration(record.seconds), ""))
    entries.append(("Devices", *_devices(record)))
    rows = (
        f"<div><dt>{name}</dt><dd>{escape(value)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in entries
    )
    return f'<dl class="summary">\n{_lines(rows)}\n</dl>'


def _epochs(record: Record) -> str:
    epochs = record.curves.get("epoch")
    if epochs is None:
        return ""
    whole = record.settings["epochs"]
    return f"{epochs.values[-1]:.4g} epochs" if whole is None else f"{epochs.values[-1]:.4g} of {whole:g} epochs"


def _duration(seconds: float) -> str:
    """In the two largest units."""
    whole = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole} s"


def _devices(record: Record) -> tuple[str, str]:
    """What computes, and how many of it."""
    if not record.sessions:
        return str(record.settings.get("accelerator", "not known")), ""
    now = record.sessions[-1]
    if now["gpus"]:
        return f"{now['processes']} × {now['gpus'][0]}", ""
    processes = f"{now['processes']} processes × " if now["processes"] > 1 else ""
    return str(now["cpu"]), f"{processes}{now['threads']} thread{'s' if now['threads'] > 1 else ''}"


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
"""By title: how values are written, and labels by TensorBoard tag."""

_SMOOTHED = {"loss", "gradient_norm", "images_per_second"}
_NO_CHARTS = {"epoch", "hp_metric", "val/top5", "val/ema_top5"}


def _charts(record: Record) -> str:
    charts = dict(_CHARTS)
    known = _NO_CHARTS.union(*(tags for _, tags in charts.values()))
    charts.update({escape(tag): ("number", {tag: ""}) for tag in record.curves if tag not in known})  # of callbacks
    figures = []
    for title, (form, tags) in charts.items():
        curves = {tag: record.curves[tag] for tag in tags if tag in record.curves}
        curves = {tag: curve for tag, curve in curves.items() if any(map(math.isfinite, curve.values))}
        if curves and not (title == "Weight decay" and len(set(curves["weight_decay"].values)) == 1):
            figures.append(_chart(title, form, curves, tags))
    return f'<div class="charts">\n{_lines(figures)}\n</div>' if figures else ""


def _chart(title: str, form: Form, curves: dict[str, Curve], labels: dict[str, str]) -> str:
    lines: list[Line] = []
    for (tag, curve), colour in zip(curves.items(), (ACCENT, CONTRAST), strict=False):
        smooth = running_mean(curve) if tag in _SMOOTHED else curve
        if smooth.values != curve.values:
            lines += [Line(curve, "as logged", colour, faint=True), Line(smooth, "running mean", colour)]
        else:
            lines.append(Line(curve, labels[tag] if len(labels) > 1 else "", colour))
    keys = "".join(
        f'<span class="key{" faint" if line.faint else ""}" style="--colour: {line.colour}">{line.label}</span>'
        for line in lines
        if line.label
    )
    curve = next(iter(curves.values()))
    ends = [f"{value:.1%}" if form == "share" else f"{value:.4g}" for value in (curve.values[0], curve.values[-1])]
    said = f"{title} over {curve.steps[-1]:,} steps: {ends[0]} at step {curve.steps[0]:,}, {ends[1]} at the end"
    return f"<figure><figcaption><b>{title}</b>{keys}</figcaption>{_svg(draw_chart(lines, form), said)}</figure>"


def _svg(svg: str, said: str) -> str:
    encoded = base64.b64encode(svg.encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{encoded}" alt="{said}">'


# Reconstructions


def _moments(record: Record) -> str:
    """A row of inputs, one of what the network saw, and one of reconstructions for each moment."""
    pictures = record.pictures
    last = len(pictures) - 1
    chosen = sorted({round(place * last / (MOMENTS - 1)) for place in range(MOMENTS)}) if pictures else []
    rows: list[str] = []
    for place in chosen:
        strips = _strips(pictures[place], record.settings["image_size"])
        if strips is None:
            continue
        if not rows:
            rows += [_moment("input", "", strips[0]), _moment("visible", "to the network", strips[1])]
        epochs = record.curves.get("epoch")
        step = pictures[place].step
        epoch = f"epoch {step * epochs.values[-1] / epochs.steps[-1]:.4g}" if epochs else ""
        rows.append(_moment(f"step {step:,}", epoch, strips[2]))
    return f'<div class="moments">\n{_lines(rows)}\n</div>' if rows else ""


def _moment(name: str, note: str, strip: Image.Image) -> str:
    side = min(strip.size)
    small = side <= _SMALL
    css = ' class="pixels"' if small else ""
    buffer = io.BytesIO()
    strip.save(buffer, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 88}))
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<div><span>{name}{f'<small>{note}</small>' if note else ''}</span>"
        f'<img{css} src="data:image/{"png" if small else "jpeg"};base64,{encoded}" '
        f'width="{strip.width}" height="{strip.height}" alt="Images: {name}"></div>'
    )


def _strips(picture: Picture, image_size: Sequence[int]) -> list[Image.Image] | None:
    """Inputs, masked inputs and reconstructions, each side by side; None if the picture is no such grid."""
    height, width = (size + 2 * GAP for size in image_size[-2:])
    with Image.open(io.BytesIO(picture.png())) as opened:
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


def _best(record: Record) -> dict[str, Any] | None:
    """The scores of the best weights, averaged or not."""
    metrics = record.metrics or {}
    scores = [metrics[name] for name in ("best_model", "best_ema") if name in metrics]
    return max(scores, key=lambda found: float(found["top1"]), default=None)


def _validation(record: Record) -> str:
    best, metrics = _best(record), record.metrics
    if best is None or metrics is None:
        return ""
    names = {"best_model": "best", "last_model": "last", "best_ema": "best average", "last_ema": "last average"}
    rows = [
        (label, f"{found['top1']:.2%}", f"{found['top5']:.2%}", f"{found['loss']:.4g}")
        for name, label in names.items()
        if (found := metrics.get(name))
    ]
    parts = [
        _table(("weights", "top-1", "top-5", "loss"), rows),
        f'<p class="soft">on {metrics["validation_images"]:,} images</p>',
        _classes(best["per_class"]),
    ]
    confusion = record.folder.path / "confusion.png"
    if confusion.is_file():
        with Image.open(confusion) as picture:
            width, height = picture.size
        encoded = base64.b64encode(confusion.read_bytes()).decode()
        parts.append(
            f'<h3>Confusion</h3>\n<figure class="confusion"><img src="data:image/png;base64,{encoded}" width="{width}" '
            f'height="{height}" alt="Confusion matrix of the best weights"></figure>'
        )
    return _lines(parts)


def _classes(accuracies: dict[str, float]) -> str:
    """A bar for each class, the worst first."""
    ranked = sorted(accuracies.items(), key=lambda item: item[1])
    bars = (
        f'<li>{escape(name)}<i style="--share: {accuracy:.2%}"></i><b>{accuracy:.1%}</b></li>'
        for name, accuracy in ranked[:MOST_LINES]
    )
    more = ranked[MOST_LINES:]
    rest = f'<p class="soft">and {len(more):,} classes from {more[0][1]:.1%} on, in metrics.json</p>' if more else ""
    return f'<h3>Each class, best weights, worst first</h3>\n<ul class="bars">\n{_lines(bars)}\n</ul>\n{rest}'


def _evaluation(found: dict[str, Any]) -> str:
    """The table that `sparkmim evaluate` shows, and what it is of."""
    rows = [Score(**row) for row in found["rows"]]
    table = EvaluationResult(found["protocol"], rows, found["classes"], [], None).table()
    heads = [str(column.header) for column in table.columns]
    body = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    images = found["images"]
    said = (
        f"Frozen features, {images['train']:,} images of {len(found['classes']):,} classes to learn from, "
        f"{images['test']:,} to test on; {found['method']}."
    )
    name = str(table.title).removesuffix(" accuracy")
    return f'<h3>Accuracy, {escape(name)}</h3>\n{_table(heads, body)}\n<p class="soft">{escape(said)}</p>\n'


def _skipped(unreadable: list[str]) -> str:
    if not unreadable:
        return ""
    rows = [f"<li>{escape(path)}</li>" for path in unreadable[:MOST_LINES]]
    more = len(unreadable) - MOST_LINES
    if more > 0:
        rows.append(f"<li>and {more:,} more, in log.txt</li>")
    count = f"{len(unreadable):,} image{'s' if len(unreadable) > 1 else ''}"
    opened = " open" if len(unreadable) <= _FEW else ""
    return f'<details{opened}><summary>{count}</summary>\n<ul class="plain">\n{_lines(rows)}\n</ul>\n</details>'


# Settings and environment

_GROUPS = {
    "Data": (
        "data", "val_data", "val_split", "image_size", "channels", "mean", "std", "max_unreadable", "crop_scale",
        "flip", "augment", "erase", "mixup", "cutmix", "smoothing", "repeats", "eval_crop",
    ),
    "Network": (
        "model", "weights", "init_weights", "freeze", "stages", "feature_modules", "patch_size", "mask_ratio",
        "decoder", "decoder_width", "drop_path",
    ),
    "Optimisation": (
        "recipe", "epochs", "iterations", "batch_size", "accumulate", "optimizer", "learning_rate", "layer_decay",
        "warmup_epochs", "warmup_iterations", "beta1", "beta2", "weight_decay", "weight_decay_end", "clip_grad",
        "loss", "ema", "seed",
    ),
    "Machine and files": (
        "out", "accelerator", "devices", "num_nodes", "precision", "channels_last", "workers", "save_minutes",
        "log_every", "picture_every", "eval_every",
    ),
}  # fmt: skip


def _settings(record: Record) -> str:
    shown = {name: value for name, value in record.settings.items() if name != "resume"}
    named = {name for names in _GROUPS.values() for name in names}
    groups = {**_GROUPS, "Others": tuple(name for name in shown if name not in named)}
    folded = []
    for title, names in groups.items():
        pairs = {
            name: "a Python object" if name in record.objects else _plain(shown[name])
            for name in names
            if name in shown
        }
        if pairs:
            folded.append(f"<details><summary>{title}</summary>\n{_pairs(pairs, 'pairs settings')}\n</details>")
    return f'<div class="folds">\n{_lines(folded)}\n</div>'


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


def _environment(sessions: list[dict[str, Any]]) -> str:
    """What the run started in, and what was different where it was resumed."""
    parts = []
    for place, session in enumerate(sessions):
        before = sessions[place - 1] if place else {}
        date = str(session["date"])[:16].replace("T", " ")
        changed = {name for name in _ENVIRONMENT if session.get(name) != before.get(name)}
        pairs = {
            label: _measured(name, value)
            for name, label in _ENVIRONMENT.items()
            if name in changed and (value := session.get(name)) not in (None, [])
        }
        same = "" if pairs else '<p class="soft">as before</p>'
        parts.append(
            f"<h3>{'Resumed' if place else 'Started'} {escape(date)}</h3>\n{_pairs(pairs, 'pairs') if pairs else same}"
        )
    return _lines(parts)


def _measured(name: str, value: Any) -> str:
    if name == "memory_gib":
        return f"{value} GiB"
    if name == "gpus":
        return ", ".join(f"{count} × {gpu}" for gpu, count in Counter(value).items())
    return _plain(value)


# HTML


def _pairs(pairs: dict[str, str], css: str) -> str:
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items())
    return f'<dl class="{css}">\n{_lines(rows)}\n</dl>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = _lines(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>\n<thead>{row(heads, "th")}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)
