"""Training segmenters, top to bottom. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from sparkmim.data import TargetDataset, normalisation
from sparkmim.data.label_maps import (
    SegmentationFiles,
    SegmentationImages,
    check_segmentation,
    find_segmentation,
    open_segmentation,
    read_class_names,
)
from sparkmim.data.labelled import Part
from sparkmim.data.loading import one_by_one
from sparkmim.data.segmentation import segmentation_resize, segmentation_transform
from sparkmim.data.source import Source
from sparkmim.drawing.annotated import draw_classes, save_label_map, side_by_side, with_legend
from sparkmim.drawing.pixels import Tones
from sparkmim.errors import UserError
from sparkmim.evaluation.segmentation import SegmentationScores, classes_at, evaluate_segmentation
from sparkmim.interop import weights
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import Weights, open_weights
from sparkmim.models import create_encoder
from sparkmim.models.encoders import own_module
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

PAIR = ("images", "labels")
"""Arguments that name a part of the data."""


def run_segmentation(settings: dict[str, Any], given: Set[str], callbacks: Sequence[pl.Callback]) -> SegmentResult:
    """Runs `sparkmim.segment`.

    Args:
        settings: its arguments.
        given: names of those that are no defaults.
        callbacks: further Lightning callbacks.
    """
    console = Console(stderr=True)
    if settings["predict"] is not None:
        return predict_label_maps(settings, console)
    if settings["eval_only"]:
        return score_segmenter(settings, console)
    settings = begun(settings, given, RunFolder(settings["out"]), MAY_CHANGE)
    batch_is_free = settings["batch_size"] is None
    start = None if settings["resume"] or settings["weights"] == "none" else open_weights(settings["weights"])
    settings = in_force(settings, start)
    train, val = open_parts(settings)
    classes = checked(console, [train, val], class_names(settings))
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


def open_parts(settings: dict[str, Any], wanted: Sequence[Part] = ("train", "val")) -> list[SegmentationImages]:
    """Images to train on, and to validate on.

    Raises:
        ValueError: if a part is not named, or half of it.
        FileNotFoundError: if it does not exist.
    """
    parts = downstream.parts_named(settings, SegmentationFiles, PAIR, find_segmentation, wanted)
    more = settings["channels"], settings["ignore"], settings["reduce_labels"]
    return [open_segmentation(*files, *more) for files in parts]


def class_names(settings: dict[str, Any]) -> list[str] | None:
    """Those in the file that `classes` names, or in `classes.txt` in the folder of the data, if there is one."""
    if settings["classes"] is not None:
        return read_class_names(settings["classes"])
    beside = Path(settings["data"] or ".").expanduser() / "classes.txt"
    return read_class_names(beside) if settings["data"] is not None and beside.is_file() else None


def checked(console: Console, parts: Sequence[SegmentationImages], names: Sequence[str] | None) -> list[str]:
    """The classes of data that nothing is wrong with; says what is worth knowing of them."""
    classes, notes = check_segmentation(parts, names)
    downstream.say_notes(console, notes)
    return classes


def build_model(settings: dict[str, Any], classes: int, start: Weights | None) -> Segmenter:
    """The segmenter that settings in force describe, with the pretrained encoder in it."""
    encoder = settings["model"]
    if isinstance(encoder, str):
        encoder = create_encoder(encoder, settings["channels"], settings["drop_path"])
    size = [settings["crop"], settings["crop"]]
    segmenter = create_segmenter(
        encoder, classes, settings["channels"], settings["norm"], size, settings["feature_modules"]
    )
    if start is not None:
        start.load_into_encoder(encoder, segmenter.backbone.hierarchy)
    segmenter.backbone.freeze(settings["frozen_stages"])
    return segmenter


def _metadata(settings: dict[str, Any], classes: list[str]) -> WeightsMetadata:
    kept = ("channels", "mean", "std", "feature_modules", "norm", "eval_short_side", "ignore", "reduce_labels")
    return WeightsMetadata(
        task="segmentation",
        model=settings["model"] if isinstance(settings["model"], str) else None,
        image_size=[settings["crop"], settings["crop"]],
        classes=classes,
        **{name: settings[name] for name in kept},
    )


# Validation


class _Seen(torch.utils.data.Dataset[Any]):
    """Images as a segmenter sees them whole, and their label maps as they are."""

    def __init__(self, images: SegmentationImages, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        image, labels = self.images[place]
        return self.transform(image.as_subclass(Tensor)), labels.as_subclass(Tensor).long()


@torch.no_grad()
def label_maps_of(
    model: nn.Module, images: SegmentationImages, places: Sequence[int], settings: dict[str, Any], device: torch.device,
    see: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Label maps that a segmenter predicts, and the true ones, long `[H, W]`; unreadable images are logged.

    Args:
        model: in evaluation mode until the end.
        images: to look at.
        places: which of them.
        settings: in force.
        device: of the model.
        see: given the place, the normalised image `[C, h, w]`, the prediction, and the truth.
    """
    transform = segmentation_resize(settings["eval_short_side"], settings["mean"], settings["std"])
    training = model.training
    model.eval()
    try:
        for place, (image, truth) in one_by_one(_Seen(images, transform), places, settings["workers"]):
            found = predicted(model, image.to(device), truth.shape, settings["precision"])
            if see is not None:
                see(place, image, found.cpu(), truth)
            yield found, truth.to(device)
    finally:
        model.train(training)


def predicted(model: nn.Module, image: Tensor, size: Sequence[int], precision: str) -> Tensor:
    """The class of each pixel of a normalised image `[C, h, w]` at another size, long `[*size]`."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        logits = model(image[None])[0]  # [classes, h, w]
    return classes_at(logits, size)


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
        tones = _tones(self.settings, self.images.arrays)

        def see(place: int, image: Tensor, found: Tensor, truth: Tensor) -> None:
            if len(pictures) < downstream.DRAWN and trainer.is_global_zero:
                pixels = tones(image[None])[0]  # [3, h, w]
                maps = [_at_size(labels, pixels) for labels in (truth, found)]
                drawn = [(255 * pixels).round().to(torch.uint8), *(draw_classes(pixels, labels) for labels in maps)]
                pictures[self.images.name(place)] = with_legend(side_by_side(drawn), maps, self.classes)

        own = range(trainer.global_rank, len(self.images), trainer.world_size)
        maps = label_maps_of(model, self.images, own, self.settings, device, see)
        return evaluate_segmentation(maps, self.classes, device), pictures


def _at_size(labels: Tensor, picture: Tensor) -> Tensor:
    """A label map `[H, W]` at the size of a picture `[C, h, w]`."""
    return nn.functional.interpolate(labels[None, None].float(), picture.shape[1:], mode="nearest-exact")[0, 0].long()


def _tones(known: dict[str, Any], arrays: bool) -> Tones:
    """What undoes the normalisation of images, or of arrays in units of their own."""
    return Tones.of(known["channels"], None if arrays else known["mean"], None if arrays else known["std"])


# Using a segmenter


def opened(settings: dict[str, Any]) -> tuple[Segmenter, Weights, dict[str, Any], torch.device, Path]:
    """The segmenter, its weights, settings in force, the device, and the folder to write into."""
    found, device, out = downstream.opened_for_use(settings, "segmenter")
    model = found.segmenter(own_module(settings["model"])).to(device)
    reduced = settings["reduce_labels"] or found.metadata.reduce_labels
    settings = {**settings, "channels": found.channels, "reduce_labels": reduced}
    downstream.fill_from_weights(settings, found, ("mean", "std", "eval_short_side", "ignore"))
    settle_machine(settings)
    return model, found, settings, device, out


def score_segmenter(settings: dict[str, Any], console: Console) -> SegmentResult:
    """Scores a segmenter on the validation images; writes `metrics.json`."""
    model, found, settings, device, out = opened(settings)
    names, known = class_names(settings), list(found.metadata.classes or ())
    if names is not None and names != known:
        raise UserError(f"the data have other classes than {found.path}: {len(names)} and {len(known)} names, which "
                         "must be the same, in the same order")  # fmt: skip
    (val,) = open_parts(settings, ("val",))
    maps = label_maps_of(model, val, range(len(val)), settings, device)
    scores = evaluate_segmentation(maps, checked(console, [val], known), device)
    downstream.say_scores(console, out, scores)
    return SegmentResult(out, 0, 0, scores.figures, model)


@torch.no_grad()
def predict_label_maps(settings: dict[str, Any], console: Console) -> SegmentResult:
    """Writes the class of each pixel of images as PNG, and draws them on the images."""
    model, found, settings, device, out = opened(settings)
    classes = list(found.metadata.classes or ())
    transform = segmentation_resize(settings["eval_short_side"], settings["mean"], settings["std"])
    means, deviations = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ("mean", "std"))
    seen: set[int] = set()
    count = 0
    for name, _, image in downstream.images_read(console, settings["predict"], settings["channels"]):
        labels = predicted(model, transform(image).to(device), image.shape[1:], settings["precision"]).cpu()  # [h, w]
        arrays = image.is_floating_point()
        normalised = ((image if arrays else image / 255) - means) / deviations  # [c, h, w]
        picture = draw_classes(_tones(settings, arrays)(normalised[None])[0], labels)  # [3, h, w]
        picture = with_legend(picture, [labels], classes)
        out.mkdir(parents=True, exist_ok=True)
        save_label_map(out / f"{name}.png", labels, len(classes), settings["reduce_labels"])
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / f"{name}.jpg", quality=92)
        count += 1
        seen.update(labels.flatten().bincount().nonzero().flatten().tolist())
    console.print(f"{count:,} images, {len(seen)} of {len(classes)} classes found: {out}", markup=False)
    return SegmentResult(out, 0, 0, {}, model)


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
