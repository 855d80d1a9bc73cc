"""A page to hide patches of images on, and to see them rebuilt. The public function is in `sparkmim.commands`.

`Playground` is what the page does, without the page; `page.py` puts Gradio's components around it.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparkmim.data import decode
from sparkmim.data.decoding import UnreadableImage, pixels_of
from sparkmim.evaluation.predict import images_source
from sparkmim.models.masking import random_visible
from sparkmim.training.source import Source
from sparkmim.visualize.masks import mask_of_text
from sparkmim.visualize.pictures import HIDDEN, at_pixels, sample_photograph, to_array
from sparkmim.visualize.reconstruction import Reconstructor
from sparkmim.visualize.shown import tones_of

SAMPLES = 12
"""Pictures to pick from at most."""

SHOWN_SIDE = 448
"""Pixels that the shorter side of a picture is enlarged to, by a whole factor, so that small images can be clicked."""

GRID = np.array([1.0, 1.0, 1.0], np.float32)
"""Colour of the lines between patches."""


class Refused(ValueError):
    """What a visitor asked cannot be; the sentence is for them."""


@dataclass(frozen=True)
class Session:
    """What one visitor looks at.

    Attributes:
        image: uint8 `[C, H, W]`, as it was decoded, but no larger than it is needed.
        name: of the file.
        visible: bool `[*grid]`.
        seed: of the random mask.
    """

    image: Tensor
    name: str
    visible: Tensor
    seed: int


@dataclass(frozen=True)
class View:
    """What is shown of a session.

    Attributes:
        seen: the image with hidden patches in grey, and lines between patches, float32 `[H, W, 3]`, enlarged.
        rebuilt: by each model, with the visible pixels pasted in, at the same size.
        losses: of each model, the error over hidden patches.
    """

    seen: Any
    rebuilt: list[Any]
    losses: list[float]


class Playground:
    """Hides and shows patches of images, and has models rebuild them.

    Args:
        models: one, or several that are to be compared under the same mask.
        max_pixels: of an upload.

    Raises:
        ValueError: if a model is not of images, or their patches differ.
    """

    def __init__(self, models: Sequence[Reconstructor], max_pixels: int = 50_000_000) -> None:
        self.models = list(models)
        self.max_pixels = max_pixels
        for model in models:
            if len(model.grid) != 2 or model.preparation.channels not in (1, 3):
                raise ValueError(
                    f"{model.path} is a model of {model.preparation.channels} channel(s) and {len(model.grid)} axes; "
                    "the playground shows colour and grey images only"
                )
            if model.grid != self.grid or model.preparation.image_size != self.size:
                raise ValueError(
                    f"{model.path} has {_times(model.grid)} patches on {_times(model.preparation.image_size)} pixels, "
                    f"but {self.models[0].path} {_times(self.grid)} on {_times(self.size)}; only models of the same "
                    "patches can be compared under one mask"
                )
            if model.preparation.channels != self.models[0].preparation.channels:
                raise ValueError(
                    f"{model.path} takes images of {model.preparation.channels} channel(s), but "
                    f"{self.models[0].path} of {self.models[0].preparation.channels}; only models of the same images "
                    "can be compared"
                )

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches down and across."""
        return self.models[0].grid

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of the images."""
        return self.models[0].preparation.image_size

    @property
    def scale(self) -> int:
        """How often pixels are enlarged for showing."""
        return max(1, -(-SHOWN_SIDE // min(self.size)))

    @property
    def mask_ratio(self) -> float:
        """That of training."""
        return self.models[0].model.mask_ratio

    def open(self, path: str | Path, ratio: float, seed: int = 0) -> Session:
        """Reads an image and hides patches at random.

        Raises:
            Refused: if it is too large, or cannot be read.
        """
        name = Path(path).name
        try:
            if pixels_of(path) > self.max_pixels:  # before any of them is decoded
                limit = f"{self.max_pixels / 1e6:.0f} megapixels"
                raise Refused(f"{name} is larger than {limit}; send a smaller copy of it")
            image = decode(path, self.models[0].preparation.channels)
        except UnreadableImage as error:
            raise Refused(f"{name} cannot be read as an image: {error.reason}") from error
        return Session(self._no_larger(image), name, self.draw(ratio, seed), seed)

    def _no_larger(self, image: Tensor) -> Tensor:
        """Twice the size that is needed at most, so that a session remembers little."""
        factor = min(image.shape[1:]) // (2 * max(self.size))
        if factor < 2:
            return image
        pooled = torch.nn.functional.avg_pool2d(image.float()[None], factor)[0]
        return pooled.round().to(torch.uint8)

    def draw(self, ratio: float, seed: int) -> Tensor:
        """A random mask; of one seed, a larger ratio hides what a smaller one hides, and more."""
        return random_visible(1, self.grid, ratio, torch.Generator().manual_seed(seed))[0]

    def toggle(self, session: Session, x: float, y: float) -> Session:
        """Hides the patch at a pixel of the picture that is shown, or shows it.

        Raises:
            Refused: if nothing would be hidden then, or nothing visible.
        """
        row, column = (
            min(int(at) * cells // (pixels * self.scale), cells - 1)
            for at, cells, pixels in zip((y, x), self.grid, self.size, strict=True)
        )
        visible = session.visible.clone()
        visible[row, column] = not visible[row, column]
        if visible.all() or not visible.any():
            what = "the last visible patch" if not visible.any() else "the last hidden patch"
            raise Refused(f"that is {what}; a model needs something to see, and something to rebuild")
        return replace(session, visible=visible)

    def written(self, session: Session, text: str) -> Session:
        """Takes a mask as text.

        Raises:
            Refused: if it is none.
        """
        try:
            return replace(session, visible=mask_of_text(text, self.grid))
        except ValueError as error:
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
        """Faint lines where patches meet."""
        pixels = pixels.copy()
        height, width = (side // cells for side, cells in zip(pixels.shape[:2], self.grid, strict=True))
        pixels[height::height] = 0.5 * pixels[height::height] + 0.5 * GRID
        pixels[:, width::width] = 0.5 * pixels[:, width::width] + 0.5 * GRID
        return pixels


def strip(view: View) -> Image.Image:
    """Everything that is shown, side by side, as one picture."""
    pictures = [view.seen, *view.rebuilt]
    gap = np.ones((view.seen.shape[0], 8, 3), np.float32)
    joined = np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)
    return Image.fromarray(to_bytes(joined))


def to_bytes(pixels: Any) -> Any:
    """`[H, W, 3]` in 0…1 to uint8."""
    return (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)


def _times(sizes: Sequence[int]) -> str:
    return "×".join(map(str, sizes))


def sample_images(images: Any, playground: Playground) -> list[str]:
    """Paths of pictures to pick from, spread evenly over what is given; those that can be read.

    Raises:
        ValueError: if there is none, or they are no files.
    """
    if images is None:
        return [sample_photograph()]
    source = images_source(images, playground.models[0].preparation)
    if source.arrays or not all(isinstance(item, str) for item in source.items[:1]):
        raise ValueError("the playground picks from image files; give paths of images or folders")
    step = max(1, len(source.items) // SAMPLES)
    readable = []
    for path in source.items[::step][:SAMPLES]:
        with suppress(Refused):
            playground.open(path, playground.mask_ratio)
            readable.append(path)
    if not readable:
        raise ValueError(f"none of the images can be read; the first is {source.items[0]}")
    return readable


def run_playground(settings: Mapping[str, Any]) -> None:
    """Runs `sparkmim.playground`.

    Args:
        settings: its arguments, as given.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the playground needs Gradio: `pip install 'sparkmim[playground]'`")
    if settings["max_megapixels"] <= 0:
        raise ValueError(f"max_megapixels is {settings['max_megapixels']}; it must be above 0")
    if settings["port"] is not None and not 0 < settings["port"] < 2**16:
        raise ValueError(f"port is {settings['port']}; ports run from 1 to 65535")
    files = [settings[name] for name in ("weights", "compare") if settings[name] is not None]
    models = [Reconstructor(file, settings["model"], settings["image_size"], settings["accelerator"]) for file in files]
    playground = Playground(models, round(1e6 * settings["max_megapixels"]))
    samples = sample_images(settings["images"], playground)
    from sparkmim.visualize.page import build_app, serve

    with tempfile.TemporaryDirectory(prefix="sparkmim-playground-") as folder:
        serve(build_app(playground, samples, Path(folder)), settings["host"], settings["port"])
