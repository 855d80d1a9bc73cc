"""A classifier's last layer, fitted to frozen features before everything is fine-tuned (LP-FT, arXiv:2202.10054)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from sparkmim.data.dataset import LabelledDataset
from sparkmim.data.loading import in_order
from sparkmim.data.samplers import counted_seed
from sparkmim.errors import UserError
from sparkmim.evaluation.linear import Standardiser, fit_logistic
from sparkmim.evaluation.scores import evaluation_mode, readable
from sparkmim.models.classifier import head_of

MOST_IMAGES = 20_000
"""That the layer is fitted to, drawn at random from more."""


def linear_head(classifier: nn.Module) -> nn.Linear:
    """Returns the last layer of a classifier.

    Raises:
        UserError: if it is not a single linear layer.
    """
    names = {name.rpartition(".")[0] for name in head_of(classifier)}
    layer = classifier.get_submodule(names.pop()) if len(names) == 1 else None
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"fit_head needs a network that ends in one linear layer, and {type(classifier).__name__} does not; "
            "use --fit-head false"
        )
    return layer


@torch.no_grad()
def fit_head(
    classifier: nn.Module,
    batches: Iterable[dict[str, Any]],
    device: torch.device,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Sets the last layer of a classifier to the logistic regression of its inputs, for batches of images and labels.

    As in `few_shot`: features are standardised, and the weight decay is one over the number of images.

    Raises:
        UserError: as for `linear_head`.
        UnusableData: if no image can be read.
    """
    head = linear_head(classifier)
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2).float()))
    try:
        with evaluation_mode(classifier):
            for batch in readable(batches):
                with precision():
                    classifier(batch["image"].to(device))
                labels.append(batch["label"].to(device))
    finally:
        hook.remove()
    features, targets = torch.cat(seen), torch.cat(labels)  # [n, C], [n]
    standard = Standardiser.of(features)
    weight, bias = fit_logistic(standard(features), targets, head.out_features, 1 / len(features))
    weight = weight / standard.scale  # of features as they are
    head.weight.copy_(weight)
    if head.bias is not None:
        head.bias.copy_(bias - weight @ standard.mean)


class HeadStart(pl.Callback):
    """Fits the last layer before the first step.

    Args:
        dataset: the training images, not augmented.
        batch_size: images at once.
        workers: loader processes.
    """

    def __init__(self, dataset: LabelledDataset, batch_size: int, workers: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.workers = workers

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            return
        # Every process fits it, to the same images.
        generator = torch.Generator().manual_seed(counted_seed(self.dataset.seed, "head"))
        chosen = torch.randperm(len(self.dataset), generator=generator)[:MOST_IMAGES].sort().values.tolist()
        loader = in_order(self.dataset, chosen, self.batch_size, self.workers)
        model: Any = pl_module.model
        fit_head(model, loader, pl_module.device, trainer.precision_plugin.forward_context)
