"""Training segmenters, top to bottom. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor, nn

from sparkmim.data import TargetDataset, normalisation
from sparkmim.data.label_maps import (
    SegmentationFiles,
    SegmentationImages,
    find_segmentation,
    open_segmentation,
)
from sparkmim.data.labelled import Part
from sparkmim.data.parts import find_part
from sparkmim.data.segmentation import segmentation_resize, segmentation_transform
from sparkmim.data.source import Source
from sparkmim.drawing.annotated import draw_classes, side_by_side, with_legend
from sparkmim.errors import UserError
from sparkmim.evaluation.segmentation import SegmentationScores, evaluate_segmentation
from sparkmim.evaluation.segmenter import (
    checked_classes,
    class_names,
    predict_label_maps,
    run_segmenter,
    score_segmenter,
    tones_of,
)
from sparkmim.interop import weights
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.models import create_encoder
from sparkmim.models.segmenter import Segmenter, create_segmenter
from sparkmim.results import SegmentResult
from sparkmim.runs.folder import RunFolder
from sparkmim.training import downstream
from sparkmim.training.downstream import Scorer
from sparkmim.training.loop import Plan, begun, network_text, plan_for, settle_machine
from sparkmim.training.modules import SegmentModule
from sparkmim.training.recipes import segment_recipe_named

MAY_CHANGE = downstream.MAY_CHANGE | {"labels", "val_labels", "classes"}
"""Arguments that a resumed run may be given anew: they change no result."""


def run_segmentation(settings: dict[str, Any], given: Set[str], callbacks: Sequence[pl.Callback]) -> SegmentResult:
    """Runs `sparkmim.segment`.

    Args:
        settings: its arguments.
        given: names of those that are no defaults.
        callbacks: further Lightning callbacks.
    """
    console = Console(stderr=True)
    if settings["predict"] is not None:
        return predict_label_maps(**downstream.taken_by(predict_label_maps, settings))
    if settings["eval_only"]:
        return score_segmenter(**downstream.taken_by(score_segmenter, settings))
    settings = begun(settings, given, RunFolder(settings["out"]), MAY_CHANGE)
    batch_is_free = settings["batch_size"] is None
    start = None if settings["resume"] or settings["weights"] == "none" else open_weights(settings["weights"])
    settings = in_force(settings, start)
    train, val = open_parts(settings)
    classes = checked_classes(console, [train, val], class_names(settings["data"], settings["classes"]))
    settle_colours(settings, train)

    torch.manual_seed(settings["seed"])
    model = build_model(settings, len(classes), start)
    transform = segmentation_transform(
        settings["short_side"], settings["crop"], settings["mean"], settings["std"], settings["flip"],
        settings["jitter"], train.arrays,
    )  # fmt: skip
    dataset = TargetDataset(train, transform, settings["seed"])
    plan = plan_for(settings, batch_is_free, len(dataset))
    module = SegmentModule(
        model, downstream.adamw(settings, plan), settings["seed"], settings["layer_decay"], settings["schedule"]
    )
    scorer = SegmentationScorer(val, classes, settings)
    trainer = downstream.train_scored(
        console, settings, module, dataset, plan, scorer, weights.SEGMENTER_FILE, _metadata(settings, classes),
        _rows(settings, model, train, val, classes, plan), callbacks,
    )  # fmt: skip
    figures = {} if scorer.last is None else scorer.last.figures
    return SegmentResult(Path(settings["out"]), trainer.global_step, plan.steps, figures, model.eval())


def in_force(settings: dict[str, Any], start: Weights | None) -> dict[str, Any]:
    """Fills what was left to the recipe, to the pretrained weights and to the machine; `mean` and `std` may stay open.

    Raises:
        ValueError: if a setting is out of its range.
    """
    settings = dict(settings)
    downstream.fill_from_recipe(settings, segment_recipe_named(settings["recipe"]), start is None)
    downstream.fill_from_weights(settings, start, ("feature_modules", "channels", "mean", "std"))
    for name, usual in (("channels", 3), ("ignore", 255)):
        if settings[name] is None:
            settings[name] = usual
    settle_machine(settings)
    downstream.check_ranges(settings, ("channels", "short_side", "crop", "eval_short_side"))
    if settings["schedule"] not in ("cosine", "linear"):
        raise UserError(f"there is no schedule {settings['schedule']!r}; choose cosine or linear")
    return settings


def settle_colours(settings: dict[str, Any], train: SegmentationImages) -> None:
    """Fills `mean` and `std`, where neither is given nor known of the weights: of arrays, they are measured.

    Raises:
        ValueError: if there is not one value for each channel.
    """
    channels = settings["channels"]
    if settings["mean"] is None or settings["std"] is None:
        usual = normalisation(channels)
        if train.arrays:
            paths = [str(train.files.images / train.name(place)) for place in range(len(train))]
            found = Source(paths, True, channels, 2).statistics()
            usual = tuple(found.mean), tuple(found.std)
        settings["mean"], settings["std"] = settings["mean"] or usual[0], settings["std"] or usual[1]
    for name in ("mean", "std"):
        settings[name] = list(settings[name])
        if len(settings[name]) != channels:
            raise UserError(f"{name} has {len(settings[name])} value(s) for {channels} channel(s)")


def open_parts(settings: dict[str, Any]) -> list[SegmentationImages]:
    """Images to train on, and to validate on.

    Raises:
        ValueError: if a part is not named, or half of it.
        FileNotFoundError: if it does not exist.
    """
    parts = []
    wanted: tuple[tuple[Part, str], ...] = ("train", ""), ("val", "val_")
    for part, prefix in wanted:
        named = {f"{prefix}{name}": settings[f"{prefix}{name}"] for name in ("images", "labels")}
        parts.append(find_part(part, settings["data"], named, SegmentationFiles, find_segmentation))
    more = settings["channels"], settings["ignore"], settings["reduce_labels"]
    return [open_segmentation(*files, *more) for files in parts]


def build_model(settings: dict[str, Any], classes: int, start: Weights | None) -> Segmenter:
    """The segmenter that settings in force describe, with the pretrained encoder in it."""
    encoder = settings["model"]
    if isinstance(encoder, str):
        encoder = create_encoder(encoder, settings["channels"], settings["drop_path"])
    if start is not None:
        start.load_into_encoder(encoder)
    size = [settings["crop"], settings["crop"]]
    segmenter = create_segmenter(
        encoder, classes, settings["channels"], settings["norm"], size, settings["feature_modules"]
    )
    segmenter.backbone.freeze(settings["frozen_stages"])
    return segmenter


def _metadata(settings: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    kept = ("channels", "mean", "std", "feature_modules", "norm", "eval_short_side", "ignore", "reduce_labels")
    return {
        "task": "segmentation",
        "model": settings["model"] if isinstance(settings["model"], str) else None,
        "image_size": [settings["crop"], settings["crop"]],
        "classes": classes,
        **{name: settings[name] for name in kept},
    }


# Validation


class SegmentationScorer(Scorer[SegmentationScores]):
    """Scores a segmenter.

    Args:
        images: to validate on.
        classes: their names.
        settings: in force.
    """

    pictures = "image, truth, prediction"
    logged = ("mIoU", "pixel_accuracy")
    read_back = SegmentationScores

    def __init__(self, images: SegmentationImages, classes: Sequence[str], settings: dict[str, Any]) -> None:
        super().__init__()
        self.images, self.classes, self.settings = images, classes, settings

    def score(
        self, trainer: pl.Trainer, model: nn.Module, device: torch.device
    ) -> tuple[SegmentationScores, dict[str, Tensor]]:
        pictures: dict[str, Tensor] = {}
        settings = self.settings
        tones = tones_of(settings["channels"], settings["mean"], settings["std"], self.images.arrays)

        def see(place: int, image: Tensor, found: Tensor, truth: Tensor) -> None:
            if len(pictures) < downstream.DRAWN and trainer.is_global_zero:
                pixels = tones(image[None])[0]  # [3, h, w]
                maps = [_at_size(labels, pixels) for labels in (truth, found)]
                drawn = [(255 * pixels).round().to(torch.uint8), *(draw_classes(pixels, labels) for labels in maps)]
                pictures[self.images.name(place)] = with_legend(side_by_side(drawn), maps, self.classes)

        own = range(trainer.global_rank, len(self.images), trainer.world_size)
        transform = segmentation_resize(settings["eval_short_side"], settings["mean"], settings["std"])
        low_precision = settings["precision"] == "bf16-mixed"
        maps = run_segmenter(model, self.images, own, transform, settings["workers"], device, low_precision, see)
        return evaluate_segmentation(maps, self.classes, device), pictures


def _at_size(labels: Tensor, picture: Tensor) -> Tensor:
    """A label map `[H, W]` at the size of a picture `[C, h, w]`."""
    return nn.functional.interpolate(labels[None, None].float(), picture.shape[1:], mode="nearest-exact")[0, 0].long()


def _rows(
    settings: dict[str, Any], model: nn.Module, train: SegmentationImages, val: SegmentationImages,
    classes: Sequence[str], plan: Plan,
) -> dict[str, str]:  # fmt: skip
    """Settings in words."""
    return {
        "model": f"Panoptic FPN's head on {network_text(settings, model)}; norm {settings['norm']}",
        "data": f"{len(train):,} images of {len(classes)} classes, {len(val):,} for validation",
        "length": downstream.length_text(plan),
        "optimiser": f"{downstream.optimizer_text(settings, plan)}, then {settings['schedule']}",
        "sizes": f"shorter side 0.5 to 2 times {settings['short_side']}, crops of {settings['crop']}; validation "
        f"{settings['eval_short_side']}",
    }
