"""Images with detections or label maps drawn on them."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from sparkmim.data.label_maps import IGNORED
from sparkmim.drawing.figures import QUIET, shortened
from sparkmim.files import replacing

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

COLOURS = ("#1f6f8b", "#c8553d", "#5a8f29", "#8e5ea2", "#c79a00", "#3b6fd4")
"""Colours of classes, in turn; dark enough for white letters."""

SURE = 0.5
"""Detections with a higher score are drawn."""

_OPACITY = 0.6
"""Share of the class colour in a pixel of a label map."""

_SMALLEST = 320
"""Minimum shorter side of a picture with a legend; smaller ones are enlarged."""

_LARGEST = 2000
"""Maximum longer side of an enlarged picture."""

_MOST_NAMES = 40
"""Maximum classes in a legend; those with the fewest pixels are only counted."""


# Detections


def draw_detections(image: Tensor, output: Mapping[str, Tensor], classes: Sequence[str]) -> Tensor:
    """Draws boxes, names and masks of detections that score above `SURE` on float `[3, H, W]` in 0…1, as uint8.

    `output` is torchvision's dictionary of boxes, labels (from 1), scores and, optionally, masks.
    """
    canvas = (255 * image.cpu()).round().to(torch.uint8)
    sure = output["scores"] > SURE
    found = {name: values[sure].cpu() for name, values in output.items()}
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    if not labels:
        return canvas
    names = [f"{classes[label - 1]} {score:.0%}" for label, score in zip(labels, scores, strict=True)]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    if "masks" in found:
        canvas = draw_segmentation_masks(canvas, found["masks"][:, 0] > 0.5, alpha=0.5, colors=colours)
    side = min(canvas.shape[1:])
    boxed: Tensor = draw_bounding_boxes(
        canvas, found["boxes"], names, colours, width=max(2, side // 200), fill_labels=True, label_colors="white",
        font=_font_file(), font_size=max(10, side // 32),
    )  # fmt: skip
    return boxed


def _font_file() -> str:
    """Returns the path of the scalable font that comes with matplotlib."""
    from matplotlib.font_manager import findfont

    return str(findfont("DejaVu Sans"))


# Label maps


def class_colour(number: int) -> tuple[int, int, int]:
    """Returns a class's colour as red, green and blue, unlike those of the classes before and after it.

    Example:
        >>> class_colour(0), class_colour(1)
        ((31, 111, 139), (200, 85, 61))
    """
    if number < len(COLOURS):
        return ImageColor.getrgb(COLOURS[number])[:3]
    hue = number * 0.618034 % 1  # the golden ratio: far from all hues before
    bright, full = ((0.95, 0.45), (0.6, 0.75), (0.8, 0.9))[number % 3]
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, full, bright))
    return red, green, blue


def draw_classes(image: Tensor, labels: Tensor) -> Tensor:
    """Draws a label map, long `[H, W]`, in colours over its image in grey; ignored pixels keep the image's colours.

    From float `[3, H, W]` in 0…1 to uint8.
    """
    labels, pixels = labels.cpu(), 255 * image.cpu()
    colours = [class_colour(number) for number in range(max(1, int(labels.max()) + 1))]
    over = torch.tensor(colours, dtype=torch.float32)[labels.clamp(min=0)].permute(2, 0, 1)  # [3, H, W]
    grey = pixels.mean(0, keepdim=True)
    mixed = torch.where(labels == IGNORED, pixels, (1 - _OPACITY) * grey + _OPACITY * over)
    return mixed.round().to(torch.uint8)


def side_by_side(pictures: Sequence[Tensor]) -> Tensor:
    """Joins pictures `[3, H, W]` of one height into a row, with white gaps."""
    gap = max(2, pictures[0].shape[2] // 64)
    framed = [nn.functional.pad(picture, (0, gap), value=255) for picture in pictures]
    return torch.cat(framed, 2)[:, :, :-gap]


def with_legend(picture: Tensor, labels: Sequence[Tensor], classes: Sequence[str]) -> Tensor:
    """Adds a legend with the classes of some label maps below a uint8 picture `[3, H, W]`, enlarged if small."""
    larger = max(1, min(-(-_SMALLEST // min(picture.shape[1:])), _LARGEST // max(picture.shape[1:])))
    picture = picture.repeat_interleave(larger, 1).repeat_interleave(larger, 2)
    width = int(picture.shape[2])
    size = max(12, min(width, int(picture.shape[1])) // 36)
    font = ImageFont.truetype(_font_file(), size)
    placed: list[tuple[str, str, int, int]] = []
    left, top = size, size // 2
    for colour, name in _entries(torch.cat([part.flatten().cpu() for part in labels]), classes, width, font):
        extent = round(font.getlength(name)) + 3 * size
        if left + extent > width and left > size:
            left, top = size, top + 2 * size
        placed.append((colour, name, left, top))
        left += extent
    legend = Image.new("RGB", (width, top + 3 * size - size // 2), "white")
    draw = ImageDraw.Draw(legend)
    for colour, name, left, top in placed:
        draw.rectangle((left, top + size // 2, left + size, top + size // 2 + size), fill=colour)
        fill = QUIET if colour == "white" else "black"
        draw.text((left + 1.5 * size, top + size), name, fill=fill, font=font, anchor="lm")
    below = torch.from_numpy(np.array(legend)).permute(2, 0, 1)  # [3, rows, W]
    return torch.cat([picture, below], 1)


def _entries(labels: Tensor, classes: Sequence[str], width: int, font: FreeTypeFont) -> list[tuple[str, str]]:
    """Returns colour and name of the classes with most pixels, in the order of the classes."""
    counts = torch.bincount(labels[labels >= 0], minlength=len(classes))
    order = counts.argsort(descending=True, stable=True).tolist()
    present = [number for number in order if counts[number]]
    shown = sorted(present[:_MOST_NAMES])
    most = max(8, int((width - 4 * font.size) / font.getlength("n")))
    entries = [(f"rgb{class_colour(number)}", shortened(classes[number], most)) for number in shown]
    if len(present) > len(shown):
        entries.append(("white", f"and {len(present) - len(shown)} more"))
    return entries


def save_label_map(path: Path, labels: Tensor, values: Sequence[int]) -> None:
    """Writes a label map, long `[H, W]`, as PNG: with a palette or, for values above 255, as 16-bit grey.

    Class 0 is written as the first of `values`, and so on.
    """
    written = np.array(values)[labels.cpu().numpy()]
    if max(values) > 255:
        image = Image.fromarray(written.astype(np.uint16))
    else:
        image = Image.fromarray(written.astype(np.uint8))
        colours = {value: class_colour(number) for number, value in enumerate(values)}
        image.putpalette([part for value in range(256) for part in colours.get(value, (0, 0, 0))])
    with replacing(path) as partial:
        image.save(partial)
