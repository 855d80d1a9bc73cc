"""Classifiers on any encoder: with its own head if it has one, else a linear layer on its deepest map."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from sparkmim.errors import UserError
from sparkmim.models.encoders import create_encoder, factory_of
from sparkmim.models.hierarchy import Hierarchy, rank_of

ENCODER_PREFIX = "encoder."
"""Prefix of the encoder's parameters inside a `PooledClassifier`."""


class PooledClassifier(nn.Module):
    """A linear layer on the average of an encoder's deepest feature map.

    Args:
        encoder: any network with a feature hierarchy; the module itself is used.
        classes: number of classes.
        channels: image channels.
        image_size: size per axis, for networks that take one size only.
        feature_modules: names of the modules whose outputs are the maps; None to find them.

    Raises:
        ValueError: if the encoder has no feature hierarchy.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: int,
        channels: int = 3,
        image_size: Sequence[int] | None = None,
        feature_modules: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        rank = len(image_size) if image_size else rank_of(encoder)
        hierarchy = Hierarchy(encoder, channels, rank, image_size, feature_modules=feature_modules)
        self.encoder = encoder
        self._hierarchy = [hierarchy]  # a list keeps the encoder from being registered twice
        self.head = nn.Linear(hierarchy.channels[-1], classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def hierarchy(self) -> Hierarchy:
        """The encoder's feature hierarchy."""
        return self._hierarchy[0]

    def forward(self, images: Tensor) -> Tensor:
        """`[B, C, *S]` to logits `[B, classes]`."""
        deepest = self.hierarchy(images)[-1]  # [B, C_k, *(S / r)]
        logits: Tensor = self.head(deepest.flatten(2).mean(-1))
        return logits


def create_classifier(
    model: str | nn.Module,
    classes: int,
    channels: int = 3,
    drop_path: float | None = None,
    image_size: Sequence[int] | None = None,
    feature_modules: Sequence[str] | None = None,
) -> nn.Module:
    """Builds a network with a classifier, randomly initialised.

    Networks of timm and torchvision, and factories that take `num_classes`, keep their own head, so that their library
    loads the weights strictly; so does a module with timm's `reset_classifier`. Others become a `PooledClassifier`.

    Args:
        model: a name for `create_encoder`, or a module, which is used itself.
        classes: number of classes.
        channels: image channels.
        drop_path: stochastic depth rate; None for the network's default.
        image_size: size per axis, for networks that take one size only.
        feature_modules: as for `PooledClassifier`.

    Raises:
        ValueError: if there is no such network, or it does not take these arguments.
    """
    if classes < 2:
        raise UserError(f"there is {classes} class; a classifier needs 2 or more")
    if isinstance(model, nn.Module):
        model = create_encoder(model, channels, drop_path)
        if callable(reset := getattr(model, "reset_classifier", None)):
            reset(classes)
            return model
        return PooledClassifier(model, classes, channels, image_size, feature_modules)
    if ".py:" in model and "num_classes" not in inspect.signature(factory_of(model)).parameters:
        return PooledClassifier(
            create_encoder(model, channels, drop_path), classes, channels, image_size, feature_modules
        )
    return create_encoder(model, channels, drop_path, classes)


def encoder_of(classifier: nn.Module) -> nn.Module:
    """Returns the encoder of a classifier: that of a `PooledClassifier`, otherwise the classifier itself."""
    return classifier.encoder if isinstance(classifier, PooledClassifier) else classifier


def head_of(classifier: nn.Module) -> tuple[str, ...]:
    """Returns the names of the parameters of the last layer, which maps features to classes.

    Raises:
        ValueError: if the network names no classifier and has no linear layer.
    """
    if isinstance(classifier, PooledClassifier):
        prefixes: tuple[str, ...] = ("head.",)
    else:
        named = getattr(classifier, "default_cfg", {}).get("classifier")
        if named is None:  # torchvision's, or the user's: the last linear layer
            linear = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
            if not linear:
                raise UserError(f"{type(classifier).__name__} has no linear layer that could be its classifier")
            named = linear[-1]
        prefixes = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    return tuple(name for name, _ in classifier.named_parameters() if name.startswith(prefixes))
