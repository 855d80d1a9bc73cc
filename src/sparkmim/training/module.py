"""The Lightning module of pretraining: the loss, the optimiser and its schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from timm.optim._param_groups import param_groups_weight_decay
from timm.optim.lamb import Lamb
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sparkmim.data import counted_seed
from sparkmim.models import SparK
from sparkmim.training import schedules


@dataclass(frozen=True)
class OptimizerSettings:
    """How the weights are moved, with absolute learning rates and counts in optimiser steps."""

    optimizer: str
    peak: float
    betas: tuple[float, float]
    weight_decay: float
    weight_decay_end: float
    clip_grad: float
    steps: int
    warmup: int


class NonFiniteLoss(RuntimeError):
    """Training has diverged."""


class PretrainModule(pl.LightningModule):
    """Trains a `SparK` model on batches of images and masks."""

    def __init__(self, model: SparK, settings: OptimizerSettings, seed: int) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.seed = seed
        self.grad_norm = torch.zeros(())
        self.step_losses: list[Tensor] = []  # of the batches since the last optimiser step
        # Set while training only: neither the optimiser nor DDP's reducer should wait for gradients that never come.
        self._frozen: list[torch.nn.Parameter] = []

    def setup(self, stage: str) -> None:
        unreached = set(self.model.unreached_parameters)
        self._frozen = [p for name, p in self.model.named_parameters() if name in unreached and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def teardown(self, stage: str) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def configure_optimizers(self) -> Optimizer:
        settings = self.settings
        tokens = [name for name, _ in self.model.named_parameters() if name.endswith("mask_token")]
        groups = param_groups_weight_decay(self.model, 1.0, no_weight_decay_list=tokens)
        for group in groups:
            group["decays"] = group["weight_decay"] > 0
        if settings.optimizer == "adamw":
            return AdamW(groups, lr=settings.peak, betas=settings.betas)
        # Clipping is done in one place, below, for every optimiser.
        return Lamb(groups, lr=settings.peak, betas=settings.betas, max_grad_norm=None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        step, settings = self.global_step, self.settings
        # What the network draws in a step depends on (seed, step, rank) alone.
        torch.manual_seed(counted_seed(self.seed, batch_idx, self.global_rank, "network"))
        rate = schedules.learning_rate(step, settings.steps, settings.warmup, settings.peak)
        decay = schedules.weight_decay(step, settings.steps, settings.weight_decay, settings.weight_decay_end)
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = decay if group["decays"] else 0.0
        self.rate, self.decay = rate, decay

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(batch["image"], batch["visible"]).loss
        self.step_losses.append(loss.detach())
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad)
