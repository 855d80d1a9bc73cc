"""Lightning modules: losses, optimisers and schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.loss.binary_cross_entropy import BinaryCrossEntropy
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from timm.optim.lamb import Lamb
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from sparkmim.data.label_maps import IGNORED
from sparkmim.data.samplers import counted_seed
from sparkmim.errors import UserError
from sparkmim.models import SparK, SparKOutput
from sparkmim.models.classifier import head_of
from sparkmim.models.contrast import Contrast
from sparkmim.training import schedules
from sparkmim.training.layer_decay import detector_layer_decay_exponents, layer_decay_exponents

LAYER_SCALES = (".gamma", ".layer_scale")
"""Ends of the names of layer scales in timm and torchvision (`[C, 1, 1]` there); they have no weight decay."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimiser settings: absolute learning rates, lengths in optimiser steps; `clip_grad` 0 disables clipping."""

    optimizer: str
    peak: float
    betas: tuple[float, float]
    weight_decay: float
    weight_decay_end: float
    clip_grad: float
    steps: int
    warmup: int


class NonFiniteLoss(UserError, RuntimeError):
    """A loss that is not finite: training has diverged."""


class ScheduledModule(pl.LightningModule):
    """Base of all trainings: an optimiser with schedules per step, and gradient clipping.

    Args:
        model: model to train.
        settings: optimiser settings.
        seed: seed of what the network draws.

    Attributes:
        step_losses: losses of the batches since the last optimiser step.
        step_figures: further figures of the last batch, by name.
        grad_norm: gradient norm of the last step, before clipping.
        rate: learning rate of the last step, without layer decay.
        decay: weight decay of the last step.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, seed: int) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.seed = seed
        self.grad_norm = torch.zeros(())
        self.step_losses: list[Tensor] = []
        self.step_figures: dict[str, Tensor] = {}
        self.rate = self.decay = 0.0

    def untrained(self) -> set[str]:
        """Returns names of the model's parameters that stay as they are."""
        return set()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Freezes what stays as it is, within the context.

        Neither the optimiser nor DDP's reducer should wait for gradients that never come.
        """
        names = self.untrained()
        frozen = [p for name, p in self.model.named_parameters() if name in names and p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns parameter groups; those with a `weight_decay` above 0 decay; `scale` multiplies the rate."""
        raise NotImplementedError

    def configure_optimizers(self) -> Optimizer:
        settings = self.settings
        groups = self.parameter_groups()
        for group in groups:
            group["decays"] = group["weight_decay"] > 0
            group.setdefault("scale", 1.0)
        if settings.optimizer == "adamw":
            return AdamW(groups, lr=settings.peak, betas=settings.betas)
        # `configure_gradient_clipping` clips for every optimiser.
        return Lamb(groups, lr=settings.peak, betas=settings.betas, max_grad_norm=None, **self.lamb_settings())

    def rate_at(self, step: int) -> float:
        """Returns the learning rate of a step: linear warm-up, then a cosine."""
        return schedules.learning_rate(step, self.settings.steps, self.settings.warmup, self.settings.peak)

    def lamb_settings(self) -> dict[str, Any]:
        """Returns further arguments of timm's `Lamb`."""
        return {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        step, settings = self.global_step, self.settings
        # What the network draws for a batch depends on (seed, batch, rank) alone, with batches counted over the run.
        torch.manual_seed(self.counted_seed(batch_idx, "network"))
        self.rate = self.rate_at(step)
        self.decay = schedules.weight_decay(step, settings.steps, settings.weight_decay, settings.weight_decay_end)
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = self.rate * group["scale"]
            group["weight_decay"] = self.decay if group["decays"] else 0.0

    def counted_seed(self, batch_idx: int, purpose: str) -> int:
        """Returns the seed of a batch, by its place in the run."""
        parts = self.trainer.accumulate_grad_batches
        return counted_seed(self.seed, self.global_step * parts + batch_idx % parts, self.global_rank, purpose)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tells Lightning where in which epoch the run stands, as if it had been saved after a batch.

        Version 0.1.0 made one long epoch of a run, and other callbacks may have ended it at the end of an epoch.
        """
        loop, length = checkpoint["loops"]["fit_loop"], int(self.trainer.limit_train_batches)
        batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        past, place = divmod(max(done, 1) - 1, length)
        batches["is_last_batch"] = place + 1 == length
        batches["current"].update(ready=place + 1, started=place + 1, processed=place + 1, completed=place)
        batches["total"].update(ready=done, started=done, processed=done, completed=done - 1)
        for progress in (epochs["current"], epochs["total"]):
            progress.update(ready=past + 1, started=past + 1, processed=past, completed=past)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad or torch.inf)


def decayed_groups(model: nn.Module, exponents: Mapping[str, int], layer_decay: float) -> list[dict[str, Any]]:
    """Groups trained parameters by exponent of layer decay, with and without weight decay (none on vectors)."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = exponents[name], parameter.ndim > 1 and not name.endswith((".bias", *LAYER_SCALES))
        group = groups.setdefault(key, {"params": [], "weight_decay": float(key[1]), "scale": layer_decay ** key[0]})
        group["params"].append(parameter)
    return list(groups.values())


def own_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what checkpoints of version 0.1.0 hold twice."""
    return {name: value for name, value in state.items() if not name.startswith("_compute.")}


class PretrainModule(ScheduledModule):
    """Trains a `SparK` model on batches of images and masks.

    Args:
        compile: whether decoder and loss are computed under torch.compile.
        contrast: weight of the contrastive loss, of batches with the two views of each image in a row; 0 for none.
    """

    model: SparK

    def __init__(
        self, model: SparK, settings: OptimizerSettings, seed: int, compile: bool = False, contrast: float = 0.0
    ) -> None:
        super().__init__(model, settings, seed)
        self.contrast_weight = contrast
        self.contrast = Contrast(model.hierarchy.channels[-1]) if contrast else None
        # Not `model.compile()`: pictures, in evaluation mode, would be compiled too.
        compute: Any = torch.compile(model.forward, dynamic=False) if compile else model
        self._compute: Callable[..., SparKOutput] = lambda *args, **kwargs: compute(*args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        checkpoint["state_dict"] = own_tensors(checkpoint["state_dict"])

    def untrained(self) -> set[str]:
        return set(self.model.unreached_parameters)

    def parameter_groups(self) -> list[dict[str, Any]]:
        ends = ("mask_token", *LAYER_SCALES)
        groups: list[dict[str, Any]] = []
        for part in (self.model, self.contrast):
            if part is not None:
                spared = [name for name, _ in part.named_parameters() if name.endswith(ends)]
                groups += param_groups_weight_decay(part, 1.0, no_weight_decay_list=spared)
        return groups

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves the mask on the CPU, where reading it keeps no GPU waiting."""
        visible = batch["visible"]
        return {**super().transfer_batch_to_device(batch, device, dataloader_idx), "visible": visible}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        out = self._compute(batch["image"], batch["visible"], with_features=self.contrast is not None)
        self.step_losses.append(out.loss.detach())
        if self.contrast is None:
            return out.loss
        contrast: Tensor = self.contrast(out.features)
        self.step_figures["contrast"] = contrast.detach()
        return out.loss + self.contrast_weight * contrast


class ClassifyModule(ScheduledModule):
    """Trains a classifier on batches of images and labels.

    Args:
        model: maps images `[B, C, *S]` to logits `[B, classes]`.
        classes: number of classes.
        layer_decay: factor on the learning rate from one group of layers to the next shallower; 1 for none.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none. With both, one is chosen at random for each batch.
        smoothing: label smoothing.
        loss: `bce` (a binary decision for each class) or `ce`.
        freeze: whether only the head is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        seed: int,
        classes: int,
        layer_decay: float,
        mixup: float,
        cutmix: float,
        smoothing: float,
        loss: Literal["bce", "ce"],
        freeze: bool,
    ) -> None:
        super().__init__(model, settings, seed)
        self.classes = classes
        self.layer_decay = layer_decay
        self.smoothing = smoothing
        self.freeze_encoder = freeze
        mixes = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "switch_prob": 0.5}
        mixing: Any = Mixup  # untyped
        self.mix = mixing(**mixes, label_smoothing=smoothing, num_classes=classes) if mixup or cutmix else None
        soft_target: Any = SoftTargetCrossEntropy  # untyped
        self.criterion: nn.Module = BinaryCrossEntropy(smoothing=0.0) if loss == "bce" else soft_target()

    def untrained(self) -> set[str]:
        head = set(head_of(self.model))
        return {name for name, _ in self.model.named_parameters() if name not in head} if self.freeze_encoder else set()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decayed_groups(self.model, layer_decay_exponents(self.model), self.layer_decay)

    def lamb_settings(self) -> dict[str, Any]:
        # As in the paper's fine-tuning: without bias correction, and adapting parameters without weight decay too.
        return {"bias_correction": False, "always_adapt": True}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        np.random.seed(self.counted_seed(batch_idx, "mix") & 0xFFFFFFFF)  # noqa: NPY002
        if self.freeze_encoder:
            self.model.eval()  # fixes running statistics and dropout too

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images, labels = batch["image"], batch["label"]
        off = self.smoothing / self.classes
        targets = torch.full((len(labels), self.classes), off, device=labels.device)  # [B, classes]
        targets.scatter_(1, labels[:, None], 1 - self.smoothing + off)
        even = len(images) // 2 * 2
        if self.mix is not None and even:  # timm mixes even batches alone; the last image of an odd one stays as it is
            mixed = self.mix(images[:even], labels[:even])
            one = images[even:], targets[even:]
            images, targets = mixed if even == len(images) else map(torch.cat, zip(mixed, one, strict=True))
        loss: Tensor = self.criterion(self.model(images), targets)
        self.step_losses.append(loss.detach())
        return loss


class PyramidModule(ScheduledModule):
    """Trains a model on a `PyramidBackbone`: layer decay in the encoder, the full learning rate elsewhere.

    Args:
        model: has the backbone as `backbone`.
        layer_decay: factor on the learning rate from one group of encoder layers to the next shallower.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, seed: int, layer_decay: float) -> None:
        super().__init__(model, settings, seed)
        self.layer_decay = layer_decay

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decayed_groups(self.model, detector_layer_decay_exponents(self.model), self.layer_decay)


class SegmentModule(PyramidModule):
    """Trains a segmenter of `create_segmenter` on batches of images and label maps.

    Args:
        model: maps images `[B, C, H, W]` to logits `[B, classes, H, W]`.
        schedule: fall of the learning rate: `cosine` or `linear`.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        seed: int,
        layer_decay: float,
        schedule: Literal["cosine", "linear"],
    ) -> None:
        super().__init__(model, settings, seed, layer_decay)
        self.schedule = schedule

    def rate_at(self, step: int) -> float:
        settings = self.settings
        shape = schedules.linear_learning_rate if self.schedule == "linear" else schedules.learning_rate
        return shape(step, settings.steps, settings.warmup, settings.peak)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        labels = batch["target"]  # [b, h, w]
        total = nn.functional.cross_entropy(self.model(batch["image"]), labels, ignore_index=IGNORED, reduction="sum")
        loss: Tensor = total / (labels != IGNORED).sum().clamp(min=1)  # all pixels of a crop may be ignored
        self.step_losses.append(loss.detach())
        return loss


class DetectModule(PyramidModule):
    """Trains a detector of `create_detector` on batches of images and targets.

    Args:
        model: takes lists of images `[C, H, W]` and of targets; returns a dictionary of losses.
        warmup_start: learning rate at the first step, as a share of the peak.
        drops: points of the run, as shares of it, at which the learning rate drops.
        drop_factor: factor on the learning rate at each drop.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        seed: int,
        layer_decay: float,
        warmup_start: float,
        drops: Sequence[float],
        drop_factor: float,
    ) -> None:
        super().__init__(model, settings, seed, layer_decay)
        self.warmup_start, self.drops, self.drop_factor = warmup_start, drops, drop_factor

    def rate_at(self, step: int) -> float:
        settings = self.settings
        return schedules.stepped_learning_rate(
            step, settings.steps, settings.warmup, settings.peak, self.warmup_start, self.drops, self.drop_factor
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses: dict[str, Tensor] = self.model(batch["image"], batch["target"])
        loss = torch.stack(list(losses.values())).sum()
        self.step_losses.append(loss.detach())
        return loss
