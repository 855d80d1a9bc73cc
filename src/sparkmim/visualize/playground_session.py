"""What visitors of the playground do: open images, hide patches, see them rebuilt; without the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparkmim.data.decoding import UnreadableImage, decode
from sparkmim.data.problems import counted
from sparkmim.data.source import Source
from sparkmim.drawing.pixels import HIDDEN, at_pixels, to_array
from sparkmim.errors import UserError
from sparkmim.models.masking import random_visible
from sparkmim.visualize.inputs import tones_of
from sparkmim.visualize.masks import mask_of_text, times
from sparkmim.visualize.reconstruct import Reconstructor

SHOWN_SIDE = 448
"""Minimum shorter side of a picture, reached by a whole factor, so that patches of small images can be clicked."""


class Refused(UserError):
    """A request that cannot be met; the message is for the visitor."""


@dataclass(frozen=True)
class Session:
    """State of one visitor: an image, and a mask drawn by a seed."""

    image: Tensor  # uint8 [C, H, W], shrunk if much larger than needed
    name: str
    visible: Tensor  # bool [*grid]
    seed: int


@dataclass(frozen=True)
class View:
    """Enlarged pictures, float32 `[H, W, 3]`: the masked image, and each model's reconstruction and its error."""

    seen: Any
    rebuilt: list[Any]
    losses: list[float]


class Playground:
    """Models that rebuild hidden patches of images, compared under the same mask."""

    def __init__(self, models: Sequence[Reconstructor]) -> None:
        self.models = list(models)
        self.grid, self.mask_ratio = models[0].grid, models[0].model.mask_ratio
        self.size, self.channels = models[0].preparation.image_size, models[0].preparation.channels
        self.scale = max(1, -(-SHOWN_SIDE // min(self.size)))  # by which pictures are enlarged
        for model in models:
            if len(model.grid) != 2 or model.preparation.channels not in (1, 3):
                raise UserError(
                    f"{model.path} is a model of {counted(model.preparation.channels, 'channel')} and "
                    f"{counted(len(model.grid), 'axis', 'axes')}; the playground shows colour and grey images only"
                )
            if model.grid != self.grid or model.preparation.image_size != self.size:
                raise UserError(
                    f"{model.path} has {times(model.grid)} patches on {times(model.preparation.image_size)} pixels, "
                    f"but {self.models[0].path} {times(self.grid)} on {times(self.size)}; only models of the same "
                    "patches can be compared under one mask"
                )
            if model.preparation.channels != self.channels:
                raise UserError(
                    f"{model.path} takes images of {counted(model.preparation.channels, 'channel')}, but "
                    f"{self.models[0].path} of {self.channels}; only models of the same images can be compared"
                )

    def open(self, path: str | Path, ratio: float, seed: int = 0) -> Session:
        """Reads an image and hides patches at random; raises `Refused` if it is too large, or cannot be read."""
        name = Path(path).name
        try:
            image = decode(path, self.channels)
        except UnreadableImage as error:
            raise Refused(f"{name} cannot be read as an image: {error.reason}") from error
        return Session(self._no_larger(image), name, self.draw(ratio, seed), seed)

    def _no_larger(self, image: Tensor) -> Tensor:
        """Shrinks an image of over twice the size needed, so that sessions stay small."""
        factor = min(image.shape[1:]) // (2 * max(self.size))
        if factor < 2:
            return image
        return torch.nn.functional.avg_pool2d(image.float()[None], factor)[0].round().to(torch.uint8)

    def draw(self, ratio: float, seed: int) -> Tensor:
        """Draws a random mask; with the same seed, a larger ratio hides what a smaller one hides, and more."""
        return random_visible(1, self.grid, ratio, torch.Generator().manual_seed(seed))[0]

    def redrawn(self, session: Session, ratio: float, step: int = 0) -> Session:
        """Draws another mask, with the seed `step` further on."""
        seed = session.seed + step
        return replace(session, visible=self.draw(ratio, seed), seed=seed)

    def toggle(self, session: Session, x: float, y: float) -> Session:
        """Hides or shows the patch at a pixel of the enlarged picture; refuses the last visible or hidden one."""
        row, column = (
            min(int(at) * cells // (pixels * self.scale), cells - 1)
            for at, cells, pixels in zip((y, x), self.grid, self.size, strict=True)
        )
        visible = session.visible.clone()
        visible[row, column] = not visible[row, column]
        if visible.all() or not visible.any():
            kind = "hidden" if visible.all() else "visible"
            raise Refused(f"that is the last {kind} patch; a model needs something to see, and something to rebuild")
        return replace(session, visible=visible)

    def written(self, session: Session, text: str) -> Session:
        """Takes a mask as text; raises `Refused` if it is none."""
        try:
            return replace(session, visible=mask_of_text(text, self.grid))
        except UserError as error:
            raise Refused(str(error)) from error

    def view(self, session: Session) -> View:
        """Rebuilds the hidden patches."""
        visible = session.visible[None]  # [1, *grid]
        rebuilt, losses = [], []
        for place, model in enumerate(self.models):
            source = Source([], False, model.preparation.channels, 2)
            images = model.preparation.transform(source)(session.image)[None]  # [1, C, H, W]
            tones = tones_of(model.preparation)
            found = model(images, visible)
            rebuilt.append(self._enlarged(to_array(tones(found.pasted))[0]))
            losses.append(found.errors.cpu()[~visible].mean().item())
            if place == 0:
                mask = at_pixels(visible, self.size)
                pixels = to_array(torch.where(mask, tones(images), HIDDEN))[0]
        return View(self._with_lines(self._enlarged(pixels)), rebuilt, losses)

    def _enlarged(self, pixels: Any) -> Any:
        return pixels.repeat(self.scale, 0).repeat(self.scale, 1)

    def _with_lines(self, pixels: Any) -> Any:
        """Draws faint white lines between patches."""
        pixels = pixels.copy()
        height, width = (side // cells for side, cells in zip(pixels.shape[:2], self.grid, strict=True))
        pixels[height::height] = 0.5 * pixels[height::height] + 0.5
        pixels[:, width::width] = 0.5 * pixels[:, width::width] + 0.5
        return pixels


def strip(view: View) -> Image.Image:
    """Joins all pictures of a view, side by side."""
    gap = np.ones((view.seen.shape[0], 8, 3), np.float32)
    parts = [part for picture in (view.seen, *view.rebuilt) for part in (gap, picture)][1:]
    return Image.fromarray(to_bytes(np.concatenate(parts, axis=1)))


def to_bytes(pixels: Any) -> Any:
    """Converts `[H, W, 3]` in 0…1 to uint8."""
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)
