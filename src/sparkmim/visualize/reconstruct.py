"""Reconstructions of masked images, for `sparkmim.reconstruct`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from torch import Tensor

from sparkmim.drawing.figures import ACCENT, CONTRAST, new_figure, shortened, show_picture, write_picture
from sparkmim.drawing.pixels import HIDDEN, at_pixels, middle_slice, to_array
from sparkmim.errors import UserError
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.models import SparK
from sparkmim.models.decoder import from_patches, to_patches
from sparkmim.models.encoders import own_module
from sparkmim.models.masking import random_visible
from sparkmim.models.spark import patch_statistics
from sparkmim.results import ReconstructResult
from sparkmim.visualize.inputs import InputImages, read_images
from sparkmim.visualize.masks import mask_given, patches_given

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 1.9
"""Width of a picture in inches."""


@dataclass(frozen=True)
class Reconstruction:
    """Images as a model rebuilds them under masks; `ReconstructResult` says what each is."""

    predicted: Tensor  # [B, C, *S], in the images' units
    pasted: Tensor  # [B, C, *S]
    errors: Tensor  # [B, *grid]


class Reconstructor:
    """A pretrained model with its decoder, and the preparation of its images; arguments as of `reconstruct`."""

    def __init__(
        self,
        weights: str | Path,
        model: Any = None,
        image_size: int | Sequence[int] | None = None,
        accelerator: str = "auto",
    ) -> None:
        self.device = device_named(accelerator)
        opened = open_weights(weights)
        if opened.kind != "pretrained":
            raise UserError(
                f"{opened.path} holds {'a classifier' if opened.kind == 'classifier' else 'an encoder alone'}, and no "
                "decoder to rebuild images with; give a run folder of `sparkmim pretrain`, its "
                "weights/spark.safetensors, or an original *_withdecoder_* file"
            )
        self.path = opened.path
        self.preparation = opened.preparation(image_size, crop=1.0)
        self.model: SparK = opened.spark(own_module(model), self.preparation.image_size).to(self.device)

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches per axis."""
        return self.model.grid

    @torch.no_grad()
    def __call__(self, images: Tensor, visible: Tensor) -> Reconstruction:
        """Rebuilds normalised images `[B, C, *S]` from the patches of a mask, bool `[B, *grid]`."""
        output = self.model(images.to(self.device), visible.to(self.device))
        block = [self.model.patch_size] * len(self.grid)
        patches = to_patches(output.images, block)  # [B, patches, C · p²]
        mean, deviation = patch_statistics(patches)
        predicted = to_patches(output.prediction.to(patches.dtype), block)
        errors = (predicted - (patches - mean) / deviation).square().mean(-1)  # [B, patches]
        predicted = from_patches(predicted * deviation + mean, self.grid, block)
        return Reconstruction(predicted, output.reconstruction, errors.view(-1, *self.grid))


def run_reconstruction(
    *,
    weights: str | Path,
    images: Any,
    out: str | Path | None,
    mask_ratio: float | None,
    masks: int,
    mask: Any,
    visible: Any,
    errors: bool,
    model: Any,
    image_size: int | Sequence[int] | None,
    limit: int,
    seed: int,
    accelerator: str,
) -> ReconstructResult:
    """Runs `sparkmim.reconstruct`."""
    choices = {"mask": mask, "visible": visible, "masks": masks if masks > 1 else None, "mask_ratio": mask_ratio}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) > 1 and given[0] in ("mask", "visible"):
        raise UserError(f"{given[0]} says what is hidden, and so does {given[1]}; give one of them")
    reconstructor = Reconstructor(weights, model, image_size, accelerator)
    grid = reconstructor.grid
    fixed: Tensor | None = None
    if mask is not None:
        fixed = mask_given(mask, grid)
    elif visible is not None:
        fixed = patches_given(visible, grid)

    shown = read_images(images, reconstructor.preparation, limit, reconstructor.device)
    if fixed is not None:
        drawn = fixed.expand(len(shown.names), 1, *grid)
    else:  # image by image, so that the masks of one do not depend on how many follow
        ratio = reconstructor.model.mask_ratio if mask_ratio is None else mask_ratio
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.stack([random_visible(masks, grid, ratio, generator) for _ in shown.names])
    by_mask = drawn.unbind(1)  # each [n, *grid]
    rebuilt = [reconstructor(shown.images, of_mask) for of_mask in by_mask]

    size = shown.images.shape[2:]
    inputs = _values(shown.images, shown)
    grey = np.float32(HIDDEN if len(grid) > 1 else np.nan)  # in a signal, a gap in the curve
    seen = [middle_slice(at_pixels(of_mask, size)).movedim(1, -1).numpy() for of_mask in by_mask]
    result = ReconstructResult(
        names=shown.names,
        inputs=inputs,
        masked=np.stack([np.where(of_mask, inputs, grey) for of_mask in seen], axis=1),
        predicted=np.stack([_values(of_mask.predicted, shown) for of_mask in rebuilt], axis=1),
        pasted=np.stack([_values(of_mask.pasted, shown) for of_mask in rebuilt], axis=1),
        visible=drawn.numpy(),
        errors=np.stack([of_mask.errors.cpu().numpy() for of_mask in rebuilt], axis=1),
        draw=draw_reconstructions,
        unreadable=shown.unreadable,
        out=None if out is None else Path(out),
    )
    write_picture(result, errors=errors)
    return result


def _values(images: Tensor, shown: InputImages) -> Any:
    """Converts normalised images to RGB in 0…1, `[B, H, W, 3]`; signals to the data's units, `[B, length, C]`."""
    if images.ndim == 3:
        values = images.detach().cpu().float().permute(0, 2, 1)  # [B, length, C]
        return (values * torch.tensor(shown.preparation.std) + torch.tensor(shown.preparation.mean)).numpy()
    return to_array(shown.tones(images))


# Drawing


@dataclass(frozen=True)
class _Cell:
    """A picture `[H, W, 3]`, or a heat map `[h, w]` with NaN where there is no value, and its captions."""

    picture: Any
    title: str = ""
    note: str = ""


def draw_reconstructions(result: ReconstructResult, errors: bool = False) -> Figure:
    """Draws a row per image: input, masked input, reconstruction, and reconstruction with visible pixels.

    Several masks of an image are side by side: masked inputs in one row, reconstructions below. Signals are curves.
    `errors` adds the error of each hidden patch as a heat map; of signals, behind the curve.
    """
    if result.inputs.ndim == 3:
        return _draw_signals(result, errors)
    rows = [row for image in range(len(result.names)) for row in _rows(result, image, errors)]
    per_image = len(rows) // len(result.names)
    height, width = result.inputs.shape[1:3]
    whole = len(rows[0]) * _CELL + (0.9 if errors else 0.3), len(rows) * (_CELL * height / width + 0.2) + 0.3
    figure = new_figure(*whole, layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    heat: Any = None
    for of_row, cells in zip(axes, rows, strict=True):
        for place, cell in zip(of_row, cells, strict=True):
            if cell.picture is None:
                place.axis("off")
            elif cell.picture.ndim == 3:
                show_picture(place, cell.picture, cell.title, cell.note)
            else:
                place.set_facecolor("#ececec")  # visible patches have no error
                heat = show_picture(place, cell.picture, cell.title, cmap="inferno", vmin=0, vmax=_worst(result))
    for image, name in enumerate(result.names):
        axes[image * per_image, 0].set_ylabel(shortened(Path(name).name, 24), fontsize=8, parse_math=False)
    if heat is not None:
        _add_bar(figure, heat, axes)
    return figure


def _worst(result: ReconstructResult) -> float:
    """Returns the error at the end of the colour scale."""
    return max(1.0, float(np.quantile(result.errors[~result.visible], 0.98)))


def _add_bar(figure: Figure, heat: Any, axes: Any) -> None:
    bar = figure.colorbar(heat, ax=axes, fraction=0.03, aspect=30, pad=0.01, extend="max", extendfrac=0.02)
    bar.set_label("error of a patch, in units of its variance", fontsize=8)
    bar.ax.tick_params(labelsize=7, length=0)
    bar.outline.set_visible(False)


def _rows(result: ReconstructResult, image: int, errors: bool) -> list[list[_Cell]]:
    """Returns the rows of an image's cells; only the first image has column titles."""
    masks = result.visible.shape[1]
    losses = [f"loss {loss:.3f}" for loss in result.losses[image]]
    heat = np.where(result.visible[image], np.nan, result.errors[image])  # [masks, *grid], NaN where visible
    if heat.ndim == 4:
        heat = heat[:, heat.shape[1] // 2]

    def title(text: str) -> str:
        return "" if image else text

    original = _Cell(result.inputs[image], title("input"))
    if masks == 1:
        row = [
            original,
            _Cell(result.masked[image, 0], title("masked")),
            _Cell(result.predicted[image, 0], title("reconstruction")),
            _Cell(result.pasted[image, 0], title("with visible pixels"), losses[0]),
        ]
        return [[*row, _Cell(heat[0], title("error"))] if errors else row]
    names = [title(f"mask {mask + 1}") for mask in range(masks)]
    rows = [
        [original, *map(_Cell, result.masked[image], names)],
        [_Cell(None), *map(_Cell, result.pasted[image], [""] * masks, losses)],
    ]
    return [*rows, [_Cell(None), *map(_Cell, heat)]] if errors else rows


def _draw_signals(result: ReconstructResult, errors: bool) -> Figure:
    """Draws a panel per signal and mask: the first channel, and its reconstruction where hidden."""
    greys = LinearSegmentedColormap.from_list("errors", ["#f4f4f4", "#9a9a9a"])  # on which both curves can be seen
    heat = ScalarMappable(Normalize(0, _worst(result)), greys)
    images, masks, patches = result.visible.shape
    figure = new_figure(8.0, 1.5 * images * masks + 0.5, layout="constrained")
    panels = figure.subplots(images * masks, 1, squeeze=False, sharex=True)[:, 0]
    block = result.inputs.shape[1] // patches
    for place, axes in enumerate(panels):
        image, mask = divmod(place, masks)
        hidden = ~result.visible[image, mask]
        for patch in np.flatnonzero(hidden):
            colour = heat.to_rgba(result.errors[image, mask, patch]) if errors else "#ececec"
            axes.axvspan(patch * block, (patch + 1) * block, color=colour, linewidth=0)
        rebuilt = np.where(np.repeat(hidden, block), result.predicted[image, mask, :, 0], np.nan)
        axes.plot(result.inputs[image, :, 0], color=ACCENT, linewidth=1, label="signal")
        axes.plot(rebuilt, color=CONTRAST, linewidth=1, label="rebuilt where hidden")
        name = shortened(Path(result.names[image]).name, 60)
        axes.set_title(f"{name}, loss {result.losses[image, mask]:.3f}", fontsize=9, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0)
    if errors:
        _add_bar(figure, heat, panels)
    curves = panels[0].get_legend_handles_labels()
    figure.legend(*curves, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
