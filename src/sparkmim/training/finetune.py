"""Fine-tuning. The public function with its documentation is in `sparkmim.commands`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from rich.table import Table
from torch import Tensor, nn

from sparkmim.data.arrays import WholeArray, array_transform
from sparkmim.data.augmentation import classify_transform, eval_transform
from sparkmim.data.dataset import LabelledDataset
from sparkmim.data.labelled import Labelled, few_of, open_labelled
from sparkmim.data.problems import counted, print_notes
from sparkmim.data.source import Source
from sparkmim.drawing.confusion import draw_confusion
from sparkmim.errors import UserError
from sparkmim.evaluation.classification import ClassificationScores, score_classifier
from sparkmim.interop.metadata import WeightsMetadata
from sparkmim.interop.weights import CLASSIFIER_FILE, Weights
from sparkmim.models.classifier import PooledClassifier, create_classifier, encoder_of
from sparkmim.results import FinetuneResult
from sparkmim.terminal import Terminal
from sparkmim.training.fit import Finished, Prepared, Training, network_text, train
from sparkmim.training.head import HeadStart, linear_head
from sparkmim.training.modules import ClassifyModule
from sparkmim.training.plan import Plan, plan_for
from sparkmim.training.recipes import FINETUNE_RECIPES
from sparkmim.training.scoring import ImageScorer
from sparkmim.training.settings import FinetuneSettings, downstream_recipe, known_of, picked, settle


def run_finetuning(
    asked: Mapping[str, Any],
    given: frozenset[str],
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Any] = (),
) -> FinetuneResult:
    """Runs `sparkmim.finetune`; for the arguments, see `train`."""
    finished = train(Finetuning(), asked, given, callbacks, loggers, draw=_leave)
    scorer = finished.prepared.scorer
    assert scorer is not None
    return FinetuneResult(
        out=finished.folder.path,
        step=finished.step,
        steps=finished.prepared.plan.steps,
        top1={name: scores.top1 for name, scores in scorer.last.items()},
        best_top1={name: scores.top1 for name, scores in scorer.best.items()},
        model=finished.model,
    )


class Finetuning(Training[FinetuneSettings]):
    """Training of a classifier."""

    kind = FinetuneSettings

    def settle(self, asked: Mapping[str, Any], before: Mapping[str, Any], start: Weights | None) -> FinetuneSettings:
        recipe = downstream_recipe(asked, FINETUNE_RECIPES, start)
        known = known_of(asked, before, start)
        settings = settle(FinetuneSettings, asked, before, recipe, known, {"channels": 3, "image_size": 224})
        if settings.freeze and start is None and not settings.resume:
            raise UserError("freeze trains the head alone, so it needs --weights; a random network has nothing to keep")
        size: Any = settings.image_size
        return replace(settings, image_size=[size, size] if isinstance(size, int) else size)

    def prepare(
        self, settings: FinetuneSettings, batch_is_free: bool, start: Weights | None, console: Terminal
    ) -> Prepared[FinetuneSettings]:
        channels, rank = settings.channels, len(settings.image_size)
        train_images, val_images = open_labelled(
            settings.data, settings.val_data, settings.val_split, settings.seed, channels, rank
        )
        if val_images is None:
            raise UserError(
                "there are no validation images; put them in a folder val/ beside train/, or set some apart with "
                "--val-split 0.2"
            )
        if warning := few_of(train_images.labels, train_images.classes):
            print_notes(console, [warning])
        source = Source.of(train_images.items, channels, rank)
        source.say_loss(settings.image_size)
        mean, std = source.normalisation(settings.mean, settings.std)
        settings = replace(settings, mean=mean, std=std)
        model = build_model(settings, len(train_images.classes), start)
        if settings.fit_head:
            linear_head(model)  # raises if there is none
        train_set, still_set, val_set = build_datasets(settings, train_images, val_images, source)
        plan = plan_for(settings, batch_is_free, len(train_set))
        settings = replace(settings, batch_size=plan.batch_size)
        if settings.channels_last and len(settings.image_size) == 2:
            model = model.to(memory_format=torch.channels_last)
        optimizer = plan.optimizer(
            settings, 256, settings.warmup_epochs * plan.steps_per_epoch, settings.optimizer,
            (settings.beta1, settings.beta2),
        )  # fmt: skip
        module = ClassifyModule(
            model,
            optimizer,
            seed=settings.seed,
            classes=len(train_images.classes),
            layer_decay=settings.layer_decay,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            smoothing=settings.smoothing,
            loss=settings.loss,
            freeze=settings.freeze,
        )
        batch = 2 * plan.batch_size // (plan.parts * plan.world_size)
        return Prepared(
            settings=settings,
            module=module,
            dataset=train_set,
            plan=plan,
            metadata=_metadata(settings, model, train_images.classes),
            file=CLASSIFIER_FILE,
            before=HeadStart(still_set, batch, settings.workers) if settings.fit_head else None,
            rows=_rows(settings, model, train_images, val_images, plan),
            scorer=ClassificationScorer(val_set, batch, settings.workers),
            repeats=settings.repeats,
        )


def build_model(settings: FinetuneSettings, classes: int, start: Weights | None) -> nn.Module:
    """Builds the classifier, with the pretrained weights in it."""
    model = create_classifier(
        settings.model, classes, settings.channels, settings.drop_path, settings.image_size, settings.feature_modules
    )
    if start is not None:
        hierarchy = model.hierarchy if isinstance(model, PooledClassifier) else None
        start.load_into_encoder(encoder_of(model), hierarchy, settings.channels)
    return model


def build_datasets(
    settings: FinetuneSettings, train_images: Labelled, val_images: Labelled, source: Source
) -> tuple[LabelledDataset, LabelledDataset, LabelledDataset]:
    """Makes data sets of training images, augmented; the same, whole; and validation images, whole."""
    size, mean, std = settings.image_size, settings.mean, settings.std
    assert mean is not None
    assert std is not None
    scale = (settings.crop_scale, 1.0)
    augmented: Any
    whole: Any
    if source.arrays:
        augmented = array_transform(size, mean, std, scale, settings.flip if len(size) == 2 else 0.0)
        whole = WholeArray(size, mean, std)
    else:
        side = (size[0], size[1])
        augmented = classify_transform(side, mean, std, scale, settings.flip, settings.augment, settings.erase)
        whole = eval_transform(side, mean, std, settings.eval_crop or None)
    seed, channels = settings.seed, settings.channels
    return (
        LabelledDataset(train_images, augmented, seed, channels, source.read),
        LabelledDataset(train_images, whole, seed, channels, source.read),
        LabelledDataset(val_images, whole, seed, channels, source.read),
    )


class ClassificationScorer(ImageScorer[ClassificationScores]):
    """Scores a classifier and its average on validation images."""

    dataset: LabelledDataset
    state_key = "Validator"

    def __init__(self, dataset: LabelledDataset, batch_size: int, workers: int) -> None:
        super().__init__(self._read, dataset, batch_size, workers)

    def _read(self, per_class: Any, **fields: Any) -> ClassificationScores:
        if isinstance(per_class, list):  # as 0.1.0 wrote it
            per_class = dict(zip(self.dataset.classes, per_class, strict=True))
        return ClassificationScores(per_class=per_class, **fields)

    def score(
        self, trainer: pl.Trainer, model: nn.Module, device: torch.device
    ) -> tuple[ClassificationScores, dict[str, Tensor]]:
        precision = trainer.precision_plugin.forward_context
        return score_classifier(model, self.batches(trainer), self.dataset.classes, device, precision), {}

    def metrics(self) -> dict[str, Any]:
        """Returns what `metrics.json` holds: last and best scores of the model and its average, and all so far."""
        return {
            "classes": self.dataset.classes,
            "validation_images": len(self.dataset),
            **{f"last_{name}": scores.as_json() for name, scores in self.last.items()},
            **{f"best_{name}": scores.as_json() for name, scores in self.best.items()},
            "history": self.history,
        }


def _leave(finished: Finished[FinetuneSettings]) -> list[Any]:
    """Draws the confusion matrix of the best weights; returns a table of accuracies."""
    scorer: Any = finished.prepared.scorer
    folder = finished.folder
    best = max(scorer.best.values(), key=lambda scores: scores.top1, default=None)
    if best is not None:
        title = f"top-1 {best.top1:.1%}, {counted(len(scorer.dataset), 'validation image')}"
        draw_confusion(best.confusion, scorer.dataset.classes, folder.path / "confusion.png", title)
    table = Table("weights", "top-1", "top-5", "best top-1", box=None, padding=(0, 2, 0, 0))
    for name, scores in scorer.last.items():
        label = "model" if name == "model" else "average"
        table.add_row(label, f"{scores.top1:.2%}", f"{scores.top5:.2%}", f"{scorer.best[name].top1:.2%}")
    return [table, f"done: weights in {folder.weights}, figures in metrics.json and confusion.png beside them"]


def _metadata(settings: FinetuneSettings, model: nn.Module, classes: list[str]) -> WeightsMetadata:
    kept = picked(settings, "image_size", "channels", "feature_modules", "mean", "std")
    return WeightsMetadata(
        model=settings.model_name,
        pooled=isinstance(model, PooledClassifier),
        classes=classes,
        crop=settings.eval_crop,
        **kept,
    )


def _rows(
    settings: FinetuneSettings, model: nn.Module, train_images: Labelled, val_images: Labelled, plan: Plan
) -> dict[str, str]:
    """Returns settings in words."""
    rate = settings.learning_rate
    side = "×".join(map(str, settings.image_size))
    return {
        "model": network_text(settings, model) + (", head alone" if settings.freeze else ""),
        "data": f"{counted(len(train_images), 'image')} of {len(train_images.classes)} classes at {side}, "
        f"{len(val_images):,} for validation",
        **recipe_rows(settings),
        "in all": f"{counted(plan.steps, 'step')}, {plan.steps_per_epoch} per epoch; peak rate "
        f"{rate * plan.batch_size / 256:g}",
    }


def recipe_rows(settings: FinetuneSettings) -> dict[str, str]:
    """Returns what a recipe decides, in words."""
    drop = settings.drop_path
    dropped = "as the network has it" if drop is None else f"{drop:g}"
    whole = "whole image" if settings.eval_crop == 0 else f"crop {settings.eval_crop:g}"
    return {
        "length": f"batch {settings.batch_size}, {settings.epochs:g} epochs, warm-up {settings.warmup_epochs:g}",
        "optimiser": f"{settings.optimizer}, rate {settings.learning_rate:g} per 256, layer decay "
        f"{settings.layer_decay:g}, weight decay {settings.weight_decay:g}, clip {settings.clip_grad or 'none'}",
        "loss": f"{settings.loss}, mixup {settings.mixup:g}, cutmix {settings.cutmix:g}, smoothing "
        f"{settings.smoothing:g}",
        "regularisation": f"drop path {dropped}, EMA {settings.ema:g}",
        "augmentation": f"{settings.augment}, crops from {settings.crop_scale:g}, erasing {settings.erase:g}, "
        f"repeated {counted(settings.repeats, 'time')}; validation {whole}",
    }
