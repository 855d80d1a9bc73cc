"""What the commands return."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass
class PretrainResult:
    """What a pretraining run came to.

    Attributes:
        out: the run folder.
        step: optimiser steps done.
        steps: optimiser steps that the run has.
        loss: mean over the last epoch that was finished in this call.
        images_per_second: lately.
        model: the trained `SparK` model, in evaluation mode.
    """

    out: Path
    step: int
    steps: int
    loss: float
    images_per_second: float
    model: Any

    @property
    def finished(self) -> bool:
        """False if the run was interrupted; `resume=True` continues it."""
        return self.step >= self.steps


@dataclass
class ExportResult:
    """What an export wrote.

    Attributes:
        out: the file or folder.
        format: of it.
        network: its name.
        tensors: how many it holds; None of a program.
        own_names: whether they have the names that the network itself gives them: it is the user's own, and other
            software must be told of it.
        difference: of a program, the largest to what PyTorch computes; None if it was not looked for.
        address: of the repository that it was pushed to, if it was.
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
        """In a line."""
        said = [f"{self.network} as {self.format}"]
        if self.tensors is not None:
            said.append(f"{self.tensors} tensors{' under its own names' if self.own_names else ''}")
        if self.difference is not None:
            said.append(f"largest difference to PyTorch {self.difference:.1e}")
        if self.address is not None:
            said.append(f"pushed to {self.address}")
        return f"{self.out}: {', '.join(said)}"


@dataclass
class Score:
    """How well frozen features of one network, at one stage, tell classes apart.

    Attributes:
        network: `weights`, `random` or `compare`.
        stage: of the feature map, counted from 1 at the shallowest.
        stride: of that map.
        accuracy: share of the test images classified rightly; of few-shot, the mean over the draws.
        spread: standard deviation over the draws.
        shots: images per class that were drawn.
        details: what the protocol chose or saw on the way.
    """

    network: str
    stage: int
    stride: int
    accuracy: float
    spread: float | None = None
    shots: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The accuracy in percent, with its spread."""
        return f"{self.accuracy:.1%}" + ("" if self.spread is None else f" ± {100 * self.spread:.1f}")


@dataclass
class EvaluationResult:
    """What an evaluation came to.

    Attributes:
        protocol: knn, linear or fewshot.
        rows: by network, stage, and number of shots.
        classes: names.
        unreadable: path and reason of each image that was left out.
        out: the JSON file; None if there was no place for one.
    """

    protocol: str
    rows: list[Score]
    classes: list[str]
    unreadable: list[str]
    out: Path | None

    def table(self) -> Table:
        """A row per network; a column per stage, or per number of images of each class."""
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
        """A network's score at its deepest stage that was judged, with the most shots."""
        return max((row for row in self.rows if row.network == network), key=lambda row: (row.stage, row.shots or 0))


@dataclass
class PredictResult:
    """What was predicted.

    Attributes:
        out: the CSV file.
        images: how many were classified.
        unreadable: path and reason of each that could not be read.
    """

    out: Path
    images: int
    unreadable: list[str]


@dataclass
class EmbedResult:
    """What was embedded.

    Attributes:
        out: the file of features.
        shape: of the features, images first.
        stage: of the feature map, counted from 1 at the shallowest.
        unreadable: path and reason of each image that was left out.
    """

    out: Path
    shape: tuple[int, ...]
    stage: int
    unreadable: list[str]


@dataclass
class FinetuneResult:
    """What a fine-tuning run came to.

    Attributes:
        out: the run folder.
        step: optimiser steps done.
        steps: optimiser steps that the run has.
        top1: validation accuracy of the last weights, of the `model` and, with `ema`, of its average `ema`.
        best_top1: of the best weights.
        model: the trained classifier, in evaluation mode.
    """

    out: Path
    step: int
    steps: int
    top1: dict[str, float]
    best_top1: dict[str, float]
    model: Any

    @property
    def finished(self) -> bool:
        """False if the run was interrupted; `resume=True` continues it."""
        return self.step >= self.steps


@dataclass
class DetectResult:
    """What training, evaluating or using a detector came to.

    Attributes:
        out: the run folder, or the folder of predictions.
        step: optimiser steps done.
        steps: optimiser steps that the run has.
        figures: COCO's, of the last scoring: `bbox/AP`, `bbox/AP50`, …, `segm/AP`, …; empty where nothing was scored.
        model: the detector, in evaluation mode.
    """

    out: Path
    step: int
    steps: int
    figures: dict[str, float]
    model: Any

    @property
    def finished(self) -> bool:
        """False if the run was interrupted; `resume=True` continues it."""
        return self.step >= self.steps


@dataclass
class SegmentResult:
    """What training, evaluating or using a segmenter came to.

    Attributes:
        out: the run folder, or the folder of predictions.
        step: optimiser steps done.
        steps: optimiser steps that the run has.
        figures: `mIoU` and `pixel_accuracy` of the last scoring; empty where nothing was scored.
        model: the segmenter, in evaluation mode; it maps normalised images to logits.
    """

    out: Path
    step: int
    steps: int
    figures: dict[str, float]
    model: Any

    @property
    def finished(self) -> bool:
        """False if the run was interrupted; `resume=True` continues it."""
        return self.step >= self.steps


@dataclass
class ReconstructResult:
    """Images, what a model saw of them, and what it rebuilt; shows itself in a notebook.

    Arrays are float32 in 0…1 as they are shown, `[n, masks, H, W, 3]`, unless said otherwise; of volumes, the middle
    slice along the first axis. Where the weights were trained on signals they are `[n, masks, length, C]`, in the
    data's units.

    Attributes:
        names: of the n images.
        inputs: `[n, H, W, 3]`.
        masked: inputs with hidden patches in grey.
        predicted: the decoder's output, visible patches too, although it was never trained on those.
        pasted: predicted where hidden, the input where visible.
        visible: bool `[n, masks, *grid]`.
        errors: mean squared error of each patch, in units of its own variance, `[n, masks, *grid]`; the loss is its
            mean over hidden patches.
        unreadable: path and reason of each image that was left out.
        draw: makes the figure.
        out: the picture; None if none was written.
    """

    names: list[str]
    inputs: Any
    masked: Any
    predicted: Any
    pasted: Any
    visible: Any
    errors: Any
    unreadable: list[str]
    draw: Callable[[ReconstructResult, bool], Any] = field(repr=False)
    out: Path | None = None

    @property
    def losses(self) -> Any:
        """Mean error over hidden patches, `[n, masks]`."""
        hidden = ~self.visible
        axes = tuple(range(2, hidden.ndim))
        return (self.errors * hidden).sum(axes) / hidden.sum(axes)

    def figure(self, errors: bool = False) -> Any:
        """A matplotlib figure: a row per image and mask.

        Args:
            errors: adds a column with the error of each patch as a heat map.
        """
        return self.draw(self, errors)

    def _repr_png_(self) -> bytes:
        return _png(self.figure())


@dataclass
class VanishingResult:
    """What becomes of a mask, and of the values under it, under dense and sparse convolution; shows itself in a
    notebook.

    Attributes:
        layers: numbers of convolutions that were looked at, from 0 on.
        shapes: by name of the shape: bool `[H, W]`, where it is visible.
        shares: by shape, then `dense` and `sparse`: share of positions that are not zero after that many layers.
        values: pixel values `whole`, `visible` (what sparse convolution sees) and `zeroed` (what dense sees).
        distances: how far the distribution of feature values is from that of the whole image, by stage, `sparse` and
            `dense`: Kolmogorov–Smirnov distance, averaged over channels; stage 0 is the image itself.
        network: whose features these are.
        unreadable: path and reason of each image that was left out.
        picture: the figure.
        out: the picture file; None if none was written.
    """

    layers: list[int]
    shapes: dict[str, Any]
    shares: dict[str, dict[str, list[float]]]
    values: dict[str, Any]
    distances: dict[str, list[float]]
    network: str
    unreadable: list[str]
    picture: Any
    out: Path | None = None

    def figure(self) -> Any:
        """The matplotlib figure."""
        return self.picture

    def _repr_png_(self) -> bytes:
        return _png(self.figure())


@dataclass
class FeaturesResult:
    """Feature maps as colours; shows itself in a notebook.

    Attributes:
        names: of the n images.
        inputs: float32 in 0…1, `[n, H, W, 3]`.
        maps: by stage: the three directions of most variance over all positions of all n images, as red, green and
            blue in 0…1, `[n, H / s, W / s, 3]`.
        explained: by stage: share of the variance that these three hold.
        unreadable: path and reason of each image that was left out.
        draw: makes the figure.
        out: the picture; None if none was written.
    """

    names: list[str]
    inputs: Any
    maps: dict[int, Any]
    explained: dict[int, float]
    unreadable: list[str]
    draw: Callable[[FeaturesResult], Any] = field(repr=False)
    out: Path | None = None

    def figure(self) -> Any:
        """A matplotlib figure: a row per image, a column per stage."""
        return self.draw(self)

    def _repr_png_(self) -> bytes:
        return _png(self.figure())


@dataclass
class NeighborsResult:
    """The images of a folder that are most like some others; shows itself in a notebook.

    Attributes:
        queries: their paths.
        neighbors: of each query, the paths of its neighbours, the nearest first.
        similarities: of these, cosines between -1 and 1.
        pictures: by path, float32 in 0…1 `[H, W, 3]`, of all that is shown.
        stage: of the feature map, counted from 1 at the shallowest.
        unreadable: path and reason of each image that was left out.
        draw: makes the figure.
        out: the picture; None if none was written.
    """

    queries: list[str]
    neighbors: list[list[str]]
    similarities: list[list[float]]
    pictures: dict[str, Any]
    stage: int
    unreadable: list[str]
    draw: Callable[[NeighborsResult], Any] = field(repr=False)
    out: Path | None = None

    def figure(self) -> Any:
        """A matplotlib figure: a row per query, its neighbours beside it."""
        return self.draw(self)

    def _repr_png_(self) -> bytes:
        return _png(self.figure())


@dataclass
class ReportResult:
    """A run's report.

    Attributes:
        out: the HTML file.
    """

    out: Path


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
