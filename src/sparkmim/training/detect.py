"""Training detectors, top to bottom. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from sparkmim.commands import DetectResult
from sparkmim.data import IMAGENET_MEAN, IMAGENET_STD, SkipLog, UnreadableImage
from sparkmim.data.coco import (
    CocoFiles,
    CocoImages,
    DetectionDataset,
    check_coco,
    check_same_categories,
    collate_detection,
    find_coco,
    open_coco,
)
from sparkmim.data.detection import detection_resize, detection_transform
from sparkmim.evaluation.coco import CocoScores, coco_results, evaluate_coco
from sparkmim.evaluation.features import Preparation, device_named
from sparkmim.evaluation.predict import images_source, own_module
from sparkmim.models import create_encoder
from sparkmim.models.detector import create_detector
from sparkmim.training import weights
from sparkmim.training.callbacks import Ema, Keeper, Monitor, StepCallback
from sparkmim.training.loader import leave_signals_to_the_parent
from sparkmim.training.loop import Plan, begun, fit, is_main_process, plan_for, say_report, settle_machine
from sparkmim.training.module import DetectModule, OptimizerSettings, ScheduledModule
from sparkmim.training.recipes import DetectRecipe, detect_recipe_named
from sparkmim.training.run import RunFolder
from sparkmim.training.weights import Weights, open_weights

log = logging.getLogger("sparkmim")

MAY_CHANGE = {
    "data", "annotations", "images", "val_annotations", "val_images", "out", "workers", "devices", "accelerator",
    "num_nodes", "accumulate", "save_minutes", "log_every", "max_unreadable", "resume", "weights",
}  # fmt: skip
"""Arguments that a resumed run may be given anew: they change no result."""

DRAWN = 4
"""Validation images that detections are drawn on, in TensorBoard."""

SURE = 0.5
"""Least score of a detection that is drawn."""


def run_detection(settings: dict[str, Any], defaults: dict[str, Any], callbacks: Sequence[pl.Callback]) -> DetectResult:
    """Runs `sparkmim.detect`.

    Args:
        settings: its arguments, as given.
        defaults: its arguments' defaults.
        callbacks: further Lightning callbacks.
    """
    console = Console(stderr=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if settings["predict"] is not None:
        return predict_detections(settings, console)
    if settings["eval_only"]:
        return score_detector(settings, console)
    folder, main = RunFolder(settings["out"]), is_main_process()
    settings = begun(settings, defaults, folder, MAY_CHANGE)
    batch_is_free = settings["batch_size"] is None
    start = None if settings["resume"] or settings["weights"] == "none" else open_weights(settings["weights"])
    settings = in_force(settings, start)
    train, val = open_parts(settings)
    for part in (train, val):
        for note in check_coco(part):
            console.print(f"[yellow]note:[/] {part.annotations.name}: ", end="")
            console.print(note, markup=False)
    check_same_categories(train, val)
    if settings["masks"] is None:
        settings["masks"] = train.has_masks

    torch.manual_seed(settings["seed"])
    model = build_model(settings, len(train.classes), start)
    transform = detection_transform(settings["short_sides"], settings["long_side"], settings["flip"], settings["crop"])
    dataset = DetectionDataset(train, transform, settings["seed"])
    if settings["iterations"] is not None:  # of the recipe's batch, or of the one given
        size = min(settings["batch_size"], len(dataset))
        settings["epochs"] = settings["iterations"] / (len(dataset) // size)
    plan = plan_for(settings, batch_is_free, len(dataset))

    module = DetectModule(
        model,
        OptimizerSettings(
            optimizer="adamw",
            peak=settings["learning_rate"] * plan.batch_size / 16,
            betas=(0.9, 0.999),
            weight_decay=settings["weight_decay"],
            weight_decay_end=settings["weight_decay"],
            clip_grad=settings["clip_grad"],
            steps=plan.steps,
            warmup=min(settings["warmup_iterations"], plan.steps - 1),
        ),
        settings["seed"],
        settings["layer_decay"],
        settings["warmup_start"],
        settings["drops"],
        settings["drop_factor"],
    )
    skipped = SkipLog(settings["max_unreadable"], epoch_size=len(dataset))
    monitor = Monitor(
        plan.batch_size, plan.steps_per_epoch, settings["log_every"], folder.checkpoint, skipped,
        console if console.is_terminal and main else None,
    )  # fmt: skip
    ema = Ema(module, settings["ema"]) if settings["ema"] else None
    metadata = _metadata(settings, train)

    def write_detector(detector: nn.Module, suffix: str, scores: CocoScores | None) -> None:
        known = {} if scores is None else {name: scores.figures[name] for name in scores.figures if name.endswith("AP")}
        path = folder.weights / weights.DETECTOR_FILE.replace(".", f"{suffix}.")
        weights.write(detector, path, {**metadata, **{name: value for name, value in known.items() if value == value}})

    def write_weights(step: int) -> None:
        write_detector(model, "", validator.last)
        if ema is not None:
            write_detector(ema.average.module, "_ema", None)
        validator.write(folder.path)

    every_steps = max(1, round(settings["eval_every"] * plan.steps_per_epoch))
    validator = DetectionValidator(val, settings["workers"], every_steps, ema, write_detector)
    keeper = Keeper(folder, settings["save_minutes"], write_weights, monitor)
    every = [monitor, *([ema] if ema else []), validator, *callbacks, keeper]
    backbone: Any = model.backbone
    backbone.low_precision = settings["precision"] == "bf16-mixed"
    trainer = fit(
        settings, module, dataset, plan, folder, every,
        say=lambda: say_settings(console, settings, model, train, val, plan), collate_fn=collate_detection,
        precision="32-true",
    )  # fmt: skip
    result = DetectResult(
        out=folder.path,
        step=trainer.global_step,
        steps=plan.steps,
        figures={} if validator.last is None else validator.last.figures,
        model=model.eval(),
    )
    if trainer.is_global_zero:
        if result.finished:
            if validator.last is not None:
                console.print(table_of(validator.last))
            console.print(f"done: weights in {folder.weights}, figures in metrics.json beside them")
        else:
            console.print(f"stopped at step {result.step} of {plan.steps}; continue with --out {folder.path} --resume")
        if skipped.count:
            console.print(f"{skipped.count} unreadable image(s) were skipped; they are named in {folder.log}")
        say_report(console, folder)
    return result


def in_force(settings: dict[str, Any], start: Weights | None) -> dict[str, Any]:
    """Fills what was left to the recipe, to the pretrained weights and to the machine.

    Raises:
        ValueError: if a setting is out of its range.
    """
    settings = dict(settings)
    recipe = detect_recipe_named(settings["recipe"])
    if start is None and settings["layer_decay"] is None:
        settings["layer_decay"] = 1.0  # decay spares what was learnt before; random layers must all learn
    if settings["epochs"] is not None:
        settings["iterations"] = None
    else:
        settings["iterations"] = recipe.iterations if settings["iterations"] is None else settings["iterations"]
    for field in fields(DetectRecipe):
        if settings.get(field.name) is None:
            settings[field.name] = getattr(recipe, field.name)
    for name in ("short_sides", "drops"):
        settings[name] = list(settings[name])
    known = {} if start is None else start.metadata
    if settings["model"] is None:
        if start is None:
            raise ValueError("no model given; --model names the network to train from scratch")
        settings["model"] = start.model
    if settings["feature_modules"] is None:
        settings["feature_modules"] = known.get("feature_modules")
    for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        settings[name] = list(settings[name] or known.get(name) or usual)
        if len(settings[name]) != 3:
            raise ValueError(f"{name} has {len(settings[name])} value(s); images for detection have 3 channels")
    settle_machine(settings)
    for name in ("out", "weights", "data", "annotations", "images", "val_annotations", "val_images"):
        if isinstance(settings[name], Path):
            settings[name] = str(settings[name])
    for name in ("batch_size", "learning_rate", "accumulate", "save_minutes", "log_every", "eval_every", "long_side",
                 "eval_short_side", "regions"):  # fmt: skip
        if settings[name] <= 0:
            raise ValueError(f"{name} is {settings[name]}; it must be above 0")
    for name in ("epochs", "iterations"):
        if settings[name] is not None and settings[name] <= 0:
            raise ValueError(f"{name} is {settings[name]}; it must be above 0")
    if not 0 < settings["layer_decay"] <= 1:
        raise ValueError(f"layer_decay is {settings['layer_decay']}; it is a factor above 0, at most 1 (none)")
    if not 0 <= settings["ema"] < 1:
        raise ValueError(f"ema is {settings['ema']}; it is a decay between 0 (off) and 1, such as 0.999")
    return settings


def open_parts(settings: dict[str, Any], wanted: Sequence[str] = ("train", "val")) -> list[CocoImages]:
    """Images to train on, and to validate on.

    Raises:
        ValueError: if a part is not named, or half of it.
        FileNotFoundError: if it does not exist.
    """
    found: list[CocoFiles | None] = [None, None]
    if settings["data"] is not None:
        found = list(find_coco(settings["data"]))
    parts = []
    for place, (part, prefix, what) in enumerate((("train", "", "train on"), ("val", "val_", "validate on"))):
        if part not in wanted:
            continue
        named = settings[f"{prefix}annotations"], settings[f"{prefix}images"]
        files = found[place]
        if any(named):
            if not all(named):
                raise ValueError(f"{prefix}annotations and {prefix}images go together; give both, or neither")
            files = CocoFiles(Path(named[0]), Path(named[1]))
        if files is None:
            flag = prefix.replace("_", "-")
            raise ValueError(
                f"there are no images to {what}; name them as --{flag}annotations and --{flag}images, or the folder of "
                "both parts as --data"
            )
        parts.append(open_coco(*files, masks=settings["masks"]))
    return parts


def build_model(settings: dict[str, Any], classes: int, start: Weights | None) -> nn.Module:
    """The detector that settings in force describe, with the pretrained encoder in it."""
    encoder = settings["model"]
    if isinstance(encoder, str):
        encoder = create_encoder(encoder, 3, settings["drop_path"])
    if start is not None:
        start.load_into_encoder(encoder)
    return create_detector(
        encoder, classes, settings["masks"], mean=settings["mean"], std=settings["std"], box_head=settings["box_head"],
        norm=settings["norm"], short_side=settings["eval_short_side"], long_side=settings["long_side"],
        feature_modules=settings["feature_modules"], box_batch_size_per_image=settings["regions"],
    )  # fmt: skip


def _metadata(settings: dict[str, Any], train: CocoImages) -> dict[str, Any]:
    kept = ("masks", "mean", "std", "feature_modules", "box_head", "norm", "eval_short_side", "long_side")
    return {
        "task": "detection",
        "model": settings["model"] if isinstance(settings["model"], str) else None,
        "channels": 3,
        "classes": train.classes,
        "category_ids": train.category_ids,
        **{name: settings[name] for name in kept},
    }


# Validation


def _resizing(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """To the size that a detector evaluates at, which its own resizing then leaves: that one does not filter."""
    prepares: Any = model.transform
    return detection_resize(prepares.min_size[0], prepares.max_size)


class _Stills(torch.utils.data.Dataset[Any]):
    """Images with their places and the sizes that they had; or the reason why there is none."""

    def __init__(self, images: CocoImages, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str, tuple[int, int]]:
        try:
            image = self.images.read(place)
        except UnreadableImage as error:
            return place, str(error), (0, 0)
        return place, self.transform(image), (int(image.shape[1]), int(image.shape[2]))


def _single(samples: list[Any]) -> Any:
    return samples[0]


@torch.no_grad()
def detections_of(
    model: nn.Module, images: CocoImages, places: Sequence[int], workers: int, device: torch.device,
    see: Callable[[int, Tensor, dict[str, Tensor]], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What a detector finds on images, in COCO's result format; unreadable images are logged.

    Args:
        model: of `create_detector`; in evaluation mode for the call.
        images: to look at.
        places: which of them.
        workers: loader processes.
        device: of the model.
        see: given the place, the image `[3, H, W]`, and torchvision's output.
    """
    loader = DataLoader(
        torch.utils.data.Subset(_Stills(images, _resizing(model)), places), 1, num_workers=workers, collate_fn=_single,
        worker_init_fn=leave_signals_to_the_parent,
    )  # fmt: skip
    training = model.training
    model.eval()
    found: list[dict[str, Any]] = []
    try:
        for place, image, size in loader:
            if isinstance(image, str):
                log.warning("unreadable image left out: %s", image)
                continue
            (output,) = model([image.to(device)])
            seen = (int(image.shape[1]), int(image.shape[2]))
            found += coco_results(output, int(images.image_ids[place]), size, seen, images.category_ids)
            if see is not None:
                see(place, image, output)
    finally:
        model.train(training)
    return found


class DetectionValidator(StepCallback):
    """Scores the detector, or its average, every few epochs; keeps the best weights, and draws some detections.

    Args:
        images: to validate on.
        workers: loader processes.
        every_steps: optimiser steps between scorings; the end is always scored.
        ema: the average, which is scored in place of the model if there is one.
        write_weights: writes a weight file, given the detector, a suffix and its scores.

    Attributes:
        last: the last scores.
        best: the highest AP so far, of masks where there are some.
    """

    def __init__(
        self,
        images: CocoImages,
        workers: int,
        every_steps: int,
        ema: Ema | None,
        write_weights: Callable[[nn.Module, str, CocoScores], None],
    ) -> None:
        super().__init__()
        self.images = images
        self.workers = workers if len(images) > 100 else 0
        self.every_steps = every_steps
        self.ema = ema
        self.write_weights = write_weights
        self.last: CocoScores | None = None
        self.best = -1.0
        self.history: list[dict[str, Any]] = []

    def on_step(self, trainer: pl.Trainer, module: ScheduledModule, step: int) -> None:
        if step % self.every_steps and step != trainer.max_steps:
            return
        model: Any = self.ema.average.module if self.ema else module.model
        pictures: list[tuple[int, Tensor]] = []

        def see(place: int, image: Tensor, output: dict[str, Tensor]) -> None:
            if len(pictures) < DRAWN and trainer.is_global_zero:
                pictures.append((place, drawn(image, output, self.images.classes)))

        own = range(trainer.global_rank, len(self.images), trainer.world_size)
        with torch.random.fork_rng(devices=[]):
            found = detections_of(model, self.images, own, self.workers, module.device, see)
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, found)
            found = [detection for part in parts for detection in part]
        with_masks = bool(model.roi_heads.has_mask()) and self.images.has_masks
        scores = evaluate_coco(self.images.annotations, found, ("bbox", "segm") if with_masks else ("bbox",))
        self.last = scores
        known = {name: value for name, value in scores.figures.items() if value == value}
        self.history.append({"step": step, **known})
        main = scores.figures["segm/AP" if with_masks else "bbox/AP"]
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in known.items()}, step)
            if isinstance(logger, TensorBoardLogger):
                for place, picture in pictures:
                    logger.experiment.add_image(f"detections/{self.images.path(place).name}", picture, step)
        log.info("step %d  validation: %s", step, "  ".join(
            f"{name} {value:.3f}" for name, value in known.items() if name.endswith("/AP")))  # fmt: skip
        if main == main and main > self.best:
            self.best = main
            if trainer.is_global_zero:
                self.write_weights(model, "_best", scores)

    def state_dict(self) -> dict[str, Any]:
        last = None if self.last is None else {"figures": self.last.figures, "per_class": self.last.per_class}
        return {"best": self.best, "history": self.history, "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.history = state_dict["best"], list(state_dict["history"])
        self.last = None if state_dict["last"] is None else CocoScores(**state_dict["last"])

    def write(self, folder: Path) -> None:
        """Writes `metrics.json`: the last figures, and all so far."""
        if self.last is not None:
            content = {**self.last.as_json(), "best": self.best, "history": self.history}
            (folder / "metrics.json").write_text(json.dumps(content, indent=1) + "\n")


# Using a detector


def _opened(settings: dict[str, Any]) -> tuple[Any, Weights, torch.device, Path]:
    """The detector, its weights, the device, and the folder to write into, which is made."""
    if settings["weights"] == "none":
        raise ValueError("no weights given; --weights names the run folder or the weight file of a detector")
    out = Path(settings["out"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; choose another --out")
    device = device_named(settings["accelerator"])
    opened = open_weights(settings["weights"])
    model = opened.detector(own_module(settings["model"])).to(device)
    return model, opened, device, out


def score_detector(settings: dict[str, Any], console: Console) -> DetectResult:
    """Scores a detector on the validation images; writes `metrics.json` and `detections.json`."""
    model, opened, device, out = _opened(settings)
    if settings["val_annotations"] is None and settings["data"] is None:
        raise ValueError(
            "there are no images to validate on; name them as --val-annotations and --val-images, or --data"
        )
    val = open_parts({**settings, "masks": opened.metadata["masks"]}, ("val",))[0]
    for note in check_coco(val):
        console.print(f"note: {val.annotations.name}: {note}", markup=False)
    unknown = [name for name in val.classes if name not in opened.metadata["classes"]]
    if unknown or val.category_ids != [
        number
        for number, name in zip(opened.metadata["category_ids"], opened.metadata["classes"], strict=True)
        if name in val.classes
    ]:
        raise ValueError(
            f"{val.annotations} has other categories than {opened.path}: {', '.join(unknown) or 'the ids differ'}"
        )
    val.category_ids = list(opened.metadata["category_ids"])
    found = detections_of(model, val, range(len(val)), settings["workers"] or 0, device)
    with_masks = bool(opened.metadata["masks"]) and val.has_masks
    scores = evaluate_coco(val.annotations, found, ("bbox", "segm") if with_masks else ("bbox",))
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(scores.as_json(), indent=1) + "\n")
    (out / "detections.json").write_text(json.dumps(found) + "\n")
    console.print(table_of(scores))
    return DetectResult(out, 0, 0, scores.figures, model)


@torch.no_grad()
def predict_detections(settings: dict[str, Any], console: Console) -> DetectResult:
    """Draws what a detector finds on images, and lists it in COCO's format in `detections.json`."""
    model, opened, device, out = _opened(settings)
    known = opened.metadata
    preparation = Preparation((1, 1), 3, known["mean"], known["std"], None)
    source = images_source(settings["predict"], preparation)
    transform = _resizing(model)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(source.items, 1):
        try:
            image = source.read(path, str(path))
        except UnreadableImage as error:
            console.print(f"left out: {error}", markup=False)
            continue
        size = (int(image.shape[1]), int(image.shape[2]))
        seen = transform(image)  # [3, h, w]
        (output,) = model([seen.to(device)])
        records.append({"id": number, "file_name": str(path), "height": size[0], "width": size[1]})
        annotations += coco_results(
            output, number, size, (int(seen.shape[1]), int(seen.shape[2])), known["category_ids"]
        )
        picture = drawn(image / 255, _at_size(output, seen, size), known["classes"])  # [3, H, W]
        name = f"{number:05d}-{Path(str(path)).stem}.jpg"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / name, quality=92)
    if not records:
        raise ValueError(f"none of the {len(source.items)} images can be read")
    categories = [
        {"id": number, "name": name} for number, name in zip(known["category_ids"], known["classes"], strict=True)
    ]
    content = {"images": records, "categories": categories, "annotations": annotations}
    (out / "detections.json").write_text(json.dumps(content) + "\n")
    sure = sum(annotation["score"] > SURE for annotation in annotations)
    console.print(f"{len(records):,} images, {sure:,} detections above {SURE:.0%}: {out}", markup=False)
    return DetectResult(out, 0, 0, {}, model)


def _at_size(output: dict[str, Tensor], seen: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """What was found on an image as it was seen, `[3, h, w]`, on that image at its own size; only what is drawn."""
    sure = output["scores"] > SURE
    scale = output["boxes"].new_tensor([size[1] / seen.shape[2], size[0] / seen.shape[1]] * 2)
    found = {name: output[name][sure] for name in output}
    found["boxes"] = found["boxes"] * scale
    if "masks" in found and len(found["masks"]):
        found["masks"] = nn.functional.interpolate(found["masks"], size, mode="bilinear", align_corners=False)
    return found


def drawn(image: Tensor, output: dict[str, Tensor], classes: Sequence[str]) -> Tensor:
    """Detections of some certainty on an image: float `[3, H, W]` in 0…1 to uint8 `[3, H, W]`."""
    canvas = (255 * image.cpu()).round().to(torch.uint8)
    sure = (output["scores"] > SURE).cpu()
    labels = output["labels"].cpu()[sure]
    if not len(labels):
        return canvas
    names = [
        f"{classes[label - 1]} {score:.0%}"
        for label, score in zip(labels.tolist(), output["scores"].cpu()[sure].tolist(), strict=True)
    ]
    palette = ["#1f6f8b", "#c8553d", "#5a8f29", "#8e5ea2", "#c79a00", "#3b6fd4"]
    colours = [palette[label % len(palette)] for label in labels.tolist()]
    if "masks" in output:
        canvas = draw_segmentation_masks(canvas, output["masks"].cpu()[sure, 0] > 0.5, alpha=0.5, colors=colours)
    width = max(2, min(canvas.shape[1:]) // 200)
    boxed: Tensor = draw_bounding_boxes(
        canvas, output["boxes"].cpu()[sure], names, colours, width=width, fill_labels=True, label_colors="white",
        font=_font(), font_size=max(10, min(canvas.shape[1:]) // 32),
    )  # fmt: skip
    return boxed


def _font() -> str:
    """The path of a font that can be drawn in any size; matplotlib brings one."""
    from matplotlib.font_manager import findfont

    return str(findfont("DejaVu Sans"))


def table_of(scores: CocoScores) -> Table:
    """The twelve figures of each kind."""
    names = [name.removeprefix("bbox/") for name in scores.figures if name.startswith("bbox/")]
    table = Table("", *names, box=None, padding=(0, 2, 0, 0))
    for kind, label in (("bbox", "boxes"), ("segm", "masks")):
        values = [scores.figures.get(f"{kind}/{name}") for name in names]
        if any(value is not None for value in values):
            cells = ("–" if value is None or value != value else f"{100 * value:.1f}" for value in values)
            table.add_row(label, *cells)
    return table


def say_settings(
    console: Console, settings: dict[str, Any], model: nn.Module, train: CocoImages, val: CocoImages, plan: Plan
) -> None:
    """Prints the settings in force."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    name = settings["model"] if isinstance(settings["model"], str) else type(settings["model"]).__name__
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    origin = "scratch" if settings["weights"] == "none" else settings["weights"]
    short = settings["short_sides"]
    for key, value in {
        "model": f"{'Mask' if settings['masks'] else 'Faster'} R-CNN on {name}, {millions:.1f} M parameters, from "
        f"{origin}; box head {settings['box_head']}, norm {settings['norm']}",
        "data": f"{len(train):,} images of {len(train.classes)} classes, {len(val):,} for validation",
        "length": f"batch {plan.batch_size}, {settings['epochs']:g} epochs, {plan.steps:,} steps in all",
        "optimiser": f"adamw, peak rate {settings['learning_rate'] * plan.batch_size / 16:g}, layer decay "
        f"{settings['layer_decay']:g}, weight decay {settings['weight_decay']:g}, warm-up "
        f"{settings['warmup_iterations']} steps",
        "sizes": f"shorter side {min(short)}…{max(short)}, longer at most {settings['long_side']}; validation "
        f"{settings['eval_short_side']}",
        "device": f"{settings['accelerator']}, {settings['precision']}, {settings['workers']} loader workers, "
        f"seed {settings['seed']}",
        "run folder": str(settings["out"]),
    }.items():
        table.add_row(f"[bold]{key}", value)
    console.print(table)
