"""Rivals of SparK for `transfer.py`: SimCLR, BYOL and DINO, of the package `lightly` (MIT).

Heads, losses, momentum, views and optimiser are those of lightly's benchmark of small images
(`docs/source/getting_started/benchmarks/cifar10_benchmark.py`): batches of 128, SGD with momentum 0.9 and weight decay
5e-4, a cosine. Learning rates are per 128 images; the published one is 0.06.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import heads
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import DINOTransform, SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

from sparkmim.machine import has_bfloat16

BATCH = 128
MOMENTUM = 0.99
"""Of the teachers of BYOL and DINO."""


class Rival(nn.Module):
    """A method that learns from two views of each image.

    Args:
        encode: computes features `[B, width]` of images.
        width: their number.
    """

    def __init__(self, encode: nn.Module, width: int) -> None:
        super().__init__()
        self.encode = encode

    def forward(self, first: Tensor, second: Tensor, progress: float) -> Tensor:
        """Returns the loss of two views `[B, 3, H, W]`; `progress` is the share of the run that is over."""
        raise NotImplementedError

    @staticmethod
    def views(size: int) -> Callable[[object], list[Tensor]]:
        """Returns what makes two views of an image of PIL."""
        transform: Callable[[object], list[Tensor]] = SimCLRTransform(input_size=size, gaussian_blur=0.0)
        return transform


class SimCLR(Rival):
    def __init__(self, encode: nn.Module, width: int) -> None:
        super().__init__(encode, width)
        self.head = heads.SimCLRProjectionHead(width, width, 128)
        self.criterion = NTXentLoss()

    def forward(self, first: Tensor, second: Tensor, progress: float) -> Tensor:
        loss: Tensor = self.criterion(*(self.head(self.encode(view)).float() for view in (first, second)))
        return loss


class BYOL(Rival):
    def __init__(self, encode: nn.Module, width: int) -> None:
        super().__init__(encode, width)
        self.student = nn.Sequential(encode, heads.BYOLProjectionHead(width, 1024, 256))
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
        self.teacher = copy.deepcopy(self.student)
        deactivate_requires_grad(self.teacher)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, first: Tensor, second: Tensor, progress: float) -> Tensor:
        update_momentum(self.student, self.teacher, MOMENTUM)
        with torch.no_grad():
            targets = [self.teacher(view).float() for view in (second, first)]
        guesses = [self.predictor(self.student(view)).float() for view in (first, second)]
        losses = [self.criterion(guess, target) for guess, target in zip(guesses, targets, strict=True)]
        return torch.stack(losses).mean()


class DINO(Rival):
    def __init__(self, encode: nn.Module, width: int) -> None:
        super().__init__(encode, width)
        own, other = (heads.DINOProjectionHead(width, 2048, 256, 2048, batch_norm=True) for _ in range(2))
        other.load_state_dict(own.state_dict())  # weight norm cannot be copied
        self.student = nn.Sequential(encode, own)
        self.teacher = nn.Sequential(copy.deepcopy(encode), other)
        deactivate_requires_grad(self.teacher)
        # The teacher's temperature rises over the first 30 of 200 epochs.
        self.criterion = DINOLoss(output_dim=2048, warmup_teacher_temp_epochs=30)

    def forward(self, first: Tensor, second: Tensor, progress: float) -> Tensor:
        update_momentum(self.student, self.teacher, MOMENTUM)
        with torch.no_grad():
            targets = [self.teacher(view).float() for view in (first, second)]
        guesses = [self.student(view).float() for view in (first, second)]
        loss: Tensor = self.criterion(targets, guesses, epoch=int(200 * progress))
        return loss

    @staticmethod
    def views(size: int) -> Callable[[object], list[Tensor]]:
        transform: Callable[[object], list[Tensor]] = DINOTransform(
            global_crop_size=size, n_local_views=0, gaussian_blur=(0, 0, 0)
        )
        return transform


RIVALS: dict[str, type[Rival]] = {"SimCLR": SimCLR, "BYOL": BYOL, "DINO": DINO}


class Views(Dataset[list[Tensor]]):
    """Two views of each image, from uint8 `[3, H, W]`."""

    def __init__(self, images: Sequence[Tensor], transform: Callable[[object], list[Tensor]]) -> None:
        self.images = [to_pil_image(image) for image in images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> list[Tensor]:
        return self.transform(self.images[place])


def train_rival(
    name: str, encode: nn.Module, width: int, images: Sequence[Tensor], size: int, rate: float, steps: int, seed: int
) -> None:
    """Trains what `encode` computes with, in place.

    Args:
        name: of the rival.
        encode: computes features `[B, width]` of images `[B, 3, size, size]`.
        width: number of features.
        images: uint8 `[3, H, W]` each.
        size: side of the views.
        rate: learning rate, per 128 images.
        steps: of the optimiser.
        seed: of the heads and of everything that is drawn.
    """
    torch.manual_seed(seed)
    random.seed(seed)  # which lightly's transforms draw from too
    np.random.seed(seed)  # noqa: NPY002
    kind = RIVALS[name]
    rival = kind(encode, width).to(memory_format=torch.channels_last)
    trained = [parameter for parameter in rival.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=5e-4)
    views_of = Views(images, kind.views(size))
    batches = DataLoader(views_of, min(BATCH, len(images)), shuffle=True, drop_last=True)

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from batches

    for step, views in zip(range(steps), endless(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        first, second = (view.to(memory_format=torch.channels_last) for view in views)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16("cpu")):
            loss = rival(first, second, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
