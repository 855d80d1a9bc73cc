"""What the commands return."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

# Training


@dataclass
class TrainingResult:
    """Outcome of a training run.

    Attributes:
        out: the run folder; with `eval_only` and `predict`, the folder written to.
        step: optimiser steps done.
        steps: optimiser steps in the whole run.
    """

    out: Path
    step: int
    steps: int

    @property
    def finished(self) -> bool:
        """False if the run was interrupted; `resume=True` continues it."""
        return self.step >= self.steps


@dataclass
class PretrainResult(TrainingResult):
    """Outcome of a pretraining run.

    Attributes:
        loss: mean over the last epoch completed in this call.
        images_per_second: over the last logging interval.
        model: the trained `SparK` model, in evaluation mode.
    """

    loss: float
    images_per_second: float
    model: Any = field(repr=False)


@dataclass
class FinetuneResult(TrainingResult):
    """Outcome of a fine-tuning run.

    Attributes:
        top1: validation accuracy of the last weights: of the `model` and, if there is an average, of `ema`.
        best_top1: validation accuracy of the best weights.
        model: the trained classifier, in evaluation mode.
    """

    top1: dict[str, float]
    best_top1: dict[str, float]
    model: Any = field(repr=False)


@dataclass
class DetectResult(TrainingResult):
    """Outcome of training, evaluating or applying a detector.

    Attributes:
        figures: COCO metrics of the last evaluation: `bbox/AP`, `bbox/AP50`, …, `segm/AP`, …; empty without one.
        model: the detector, in evaluation mode.
    """

    figures: dict[str, float]
    model: Any = field(repr=False)


@dataclass
class SegmentResult(TrainingResult):
    """Outcome of training, evaluating or applying a segmenter.

    Attributes:
        figures: `mIoU` and `pixel_accuracy` of the last evaluation; empty without one.
        model: the segmenter, in evaluation mode; it maps normalised images to logits.
    """

    figures: dict[str, float]
    model: Any = field(repr=False)


# Evaluation and prediction


@dataclass
class Score:
    """Accuracy of a classifier on the frozen features of one network at one stage.

    Attributes:
        network: `weights`, `random` or `compare`.
        stage: feature map, counted from 1 at the shallowest.
        accuracy: share of test images classified correctly; for few-shot, the mean over the draws.
        spread: standard deviation over the draws.
        shots: images drawn per class.
        details: what the protocol selected or measured, such as the probe's learning rate.
    """

    network: str
    stage: int
    stride: int
    accuracy: float
    spread: float | None = None
    shots: int | None = None
    details: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def text(self) -> str:
        """Accuracy in percent, with its spread."""
        return f"{self.accuracy:.1%}" + ("" if self.spread is None else f" ± {100 * self.spread:.1f}")


@dataclass
class EvaluationResult:
    """Accuracies on frozen features.

    Attributes:
        protocol: knn, linear or fewshot.
        rows: one score per network, stage and number of shots.
        unreadable: path and reason of each skipped image.
        out: the JSON file; None if none was written.
    """

    protocol: str
    rows: list[Score]
    classes: list[str] = field(repr=False)
    unreadable: list[str] = field(repr=False)
    out: Path | None

    def table(self) -> Table:
        """Returns a table with a row per network and a column per stage, or per number of shots."""
        few = self.protocol == "fewshot"
        keys = sorted({(row.shots if few else row.stage) or 0 for row in self.rows})
        title = {"knn": "k-NN", "linear": "linear probe", "fewshot": "few-shot"}[self.protocol]
        table = Table(title=f"{title} accuracy")
        table.add_column("network")
        for key in keys:
            table.add_column(f"{key} per class" if few else f"stage {key}", justify="right")
        for name in dict.fromkeys(row.network for row in self.rows):
            by_key = {(row.shots if few else row.stage): row for row in self.rows if row.network == name}
            table.add_row(name, *(by_key[key].text if key in by_key else "" for key in keys))
        return table

    def deepest(self, network: str = "weights") -> Score:
        """Returns a network's score at its deepest evaluated stage, with the most shots."""
        return max((row for row in self.rows if row.network == network), key=lambda row: (row.stage, row.shots or 0))


@dataclass
class PredictResult:
    """Predicted classes, written to a CSV file; `unreadable` has the path and reason of each skipped image."""

    out: Path
    images: int
    unreadable: list[str] = field(repr=False)


@dataclass
class EmbedResult:
    """Features of one stage, images first, written to a file; `unreadable` is as in `PredictResult`."""

    out: Path
    shape: tuple[int, ...]
    stage: int
    unreadable: list[str] = field(repr=False)


# Export


@dataclass
class ExportResult:
    """Weights, written for other software.

    Attributes:
        format: format of the file, such as `onnx`.
        tensors: number of tensors; None for a program.
        own_names: whether tensors keep the names that the user's own network gives them, so that other software must
            be told of it.
        difference: largest difference between a program and PyTorch; None if not measured.
        address: repository pushed to.
    """

    out: Path
    format: str
    network: str
    tensors: int | None = None
    own_names: bool = False
    difference: float | None = None
    address: str | None = None

    @property
    def message(self) -> str:
        """Summary in one line."""
        said = [f"{self.network} as {self.format}"]
        if self.tensors is not None:
            said.append(f"{self.tensors} tensors{' under its own names' if self.own_names else ''}")
        if self.difference is not None:
            said.append(f"largest difference to PyTorch {self.difference:.1e}")
        if self.address is not None:
            said.append(f"pushed to {self.address}")
        return f"{self.out}: {', '.join(said)}"


@dataclass
class ReportResult:
    """Report of a run: the HTML file."""

    out: Path


# Pictures


@dataclass(kw_only=True)
class PictureResult:
    """A result that draws itself, in a notebook too.

    Attributes:
        draw: makes the figure from this result and the arguments of `figure`.
        unreadable: path and reason of each skipped image.
        out: the picture file; None if none was written.
    """

    draw: Callable[..., Any] = field(repr=False)
    unreadable: list[str] = field(repr=False)
    out: Path | None = None

    def figure(self) -> Any:
        """Returns the matplotlib figure."""
        return self.draw(self)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png")
        return buffer.getvalue()


@dataclass(kw_only=True)
class ReconstructResult(PictureResult):
    """Images, what a model saw of them, and its reconstructions.

    Pictures are float32 in 0…1, `[n, masks, H, W, 3]`; for volumes, the middle slice along the first axis. For models
    of signals they are `[n, masks, length, C]`, in the data's units.

    Attributes:
        inputs: the n images, `[n, H, W, 3]`.
        masked: inputs with hidden patches in grey.
        predicted: the decoder's output, on visible patches too, although it was never trained on those.
        pasted: predicted where hidden, the input where visible.
        visible: bool `[n, masks, *grid]`.
        errors: mean squared error of each patch in units of the patch's variance, `[n, masks, *grid]`; the loss is
            its mean over hidden patches.
    """

    names: list[str]
    inputs: Any = field(repr=False)
    masked: Any = field(repr=False)
    predicted: Any = field(repr=False)
    pasted: Any = field(repr=False)
    visible: Any = field(repr=False)
    errors: Any = field(repr=False)

    @property
    def losses(self) -> Any:
        """Mean error over hidden patches, `[n, masks]`."""
        hidden = ~self.visible
        axes = tuple(range(2, hidden.ndim))
        return (self.errors * hidden).sum(axes) / hidden.sum(axes)

    def figure(self, errors: bool = False) -> Any:
        """Returns a matplotlib figure with a row per image and mask; `errors` adds each patch's as a heat map."""
        return self.draw(self, errors)


@dataclass(kw_only=True)
class VanishingResult(PictureResult):
    """Masks, and the values under them, after dense and after sparse convolutions.

    Attributes:
        layers: numbers of convolutions after which masks are looked at, from 0 on.
        shapes: by name of the shape: bool `[H, W]`, true where visible.
        shares: by shape, then `dense` and `sparse`: share of non-zero positions after each number of layers.
        values: pixel values `whole`, `visible` (what sparse convolution sees) and `zeroed` (what dense convolution
            sees).
        distances: `sparse` and `dense`: by stage, Kolmogorov–Smirnov distance of feature values to those of the whole
            image, averaged over channels; stage 0 is the image itself.
    """

    network: str
    layers: list[int]
    shapes: dict[str, Any] = field(repr=False)
    shares: dict[str, dict[str, list[float]]] = field(repr=False)
    values: dict[str, Any] = field(repr=False)
    distances: dict[str, list[float]]


@dataclass(kw_only=True)
class FeaturesResult(PictureResult):
    """Feature maps as colours.

    Attributes:
        inputs: the n images, float32 in 0…1, `[n, H, W, 3]`.
        maps: by stage: float32 in 0…1, `[n, H / s, W / s, 3]`; red, green and blue are the three directions of most
            variance over all positions of all images.
        explained: by stage: share of the variance along these three directions.
    """

    names: list[str]
    inputs: Any = field(repr=False)
    maps: dict[int, Any] = field(repr=False)
    explained: dict[int, float]


@dataclass(kw_only=True)
class NeighborsResult(PictureResult):
    """Nearest neighbours of query images in a folder.

    Attributes:
        queries: paths of the queries.
        neighbors: for each query, paths of its neighbours, nearest first.
        similarities: for each query, cosine similarity of each neighbour, between -1 and 1.
        pictures: by path, queries and neighbours as float32 in 0…1, `[H, W, 3]`.
    """

    queries: list[str]
    neighbors: list[list[str]] = field(repr=False)
    similarities: list[list[float]] = field(repr=False)
    pictures: dict[str, Any] = field(repr=False)
    stage: int
