"""What a model sees of masked images, and what it makes of them. The public function is in `sparkmim.commands`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from torch import Tensor

from sparkmim.drawing.figures import ACCENT, CONTRAST, check_picture, new_figure, shortened, show_picture, write_picture
from sparkmim.drawing.pixels import HIDDEN, at_pixels, middle_slice, to_array
from sparkmim.errors import UserError
from sparkmim.interop.weights import open_weights
from sparkmim.machine import device_named
from sparkmim.models import SparK
from sparkmim.models.encoders import own_module
from sparkmim.models.masking import random_visible
from sparkmim.models.patches import from_patches, patch_statistics, to_patches
from sparkmim.results import ReconstructResult
from sparkmim.visualize.inputs import Shown, read_shown
from sparkmim.visualize.masks import mask_given, patches_given

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 1.9
"""Inches that a picture is wide."""


@dataclass(frozen=True)
class Rebuilt:
    """What a model made of images under masks.

    Attributes:
        predicted: `[B, C, *S]` in the images' units, visible patches too.
        pasted: predicted where hidden, the image where visible.
        errors: mean squared error of each patch, in units of its own variance, `[B, *grid]`.
    """

    predicted: Tensor
    pasted: Tensor
    errors: Tensor


class Reconstructor:
    """A pretrained model with its decoder, and how images are made ready for it.

    Args:
        weights: run folder of pretraining, weight file of ours with a decoder, or original SparK file with one.
        model: the network, where the file does not name it.
        image_size: other than that of training.
        accelerator: auto, cpu or cuda.

    Raises:
        ValueError: if there is no decoder in the file, or a size does not do.
    """

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
    def __call__(self, images: Tensor, visible: Tensor) -> Rebuilt:
        """Rebuilds images.

        Args:
            images: normalised, `[B, C, *S]`.
            visible: bool `[B, *grid]`.
        """
        output = self.model(images.to(self.device), visible.to(self.device))
        block = [self.model.patch_size] * len(self.grid)
        patches = to_patches(output.images, block)  # [B, patches, C · p²]
        mean, deviation = patch_statistics(patches)
        predicted = to_patches(output.prediction.to(patches.dtype), block)
        errors = (predicted - (patches - mean) / deviation).square().mean(-1)  # [B, patches]
        return Rebuilt(
            from_patches(predicted * deviation + mean, self.grid, block),
            output.reconstruction,
            errors.view(-1, *self.grid),
        )


def run_reconstruction(settings: Mapping[str, Any]) -> ReconstructResult:
    """Runs `sparkmim.reconstruct`.

    Args:
        settings: its arguments, as given.
    """
    out = check_picture(settings["out"], settings["overwrite"])
    masks, given = settings["masks"], [name for name in ("mask", "visible") if settings[name] is not None]
    if masks < 1:
        raise UserError(f"masks is {masks}; it must be above 0")
    if len(given) == 2 or (given and (masks > 1 or settings["mask_ratio"] is not None)):
        others = [*given[1:], *(["masks"] if masks > 1 else []),
                  *(["mask_ratio"] if settings["mask_ratio"] is not None else [])]  # fmt: skip
        raise UserError(f"{given[0]} says what is hidden, and so does {others[0]}; give one of them")
    reconstructor = Reconstructor(
        settings["weights"], settings["model"], settings["image_size"], settings["accelerator"]
    )
    grid = reconstructor.grid
    fixed: Tensor | None = None
    if settings["mask"] is not None:
        fixed = mask_given(settings["mask"], grid)
    elif settings["visible"] is not None:
        fixed = patches_given(settings["visible"], grid)
    ratio = reconstructor.model.mask_ratio if settings["mask_ratio"] is None else settings["mask_ratio"]
    generator = torch.Generator().manual_seed(settings["seed"])
    random_visible(1, grid, ratio)  # refuses a ratio out of range before anything is read

    shown = read_shown(settings["images"], reconstructor.preparation, settings["limit"], reconstructor.device)
    count = len(shown.names)
    if fixed is not None:
        visible = fixed.expand(count, 1, *grid)
    else:  # image by image, so that one has the same masks whatever follows it
        visible = torch.stack([random_visible(masks, grid, ratio, generator) for _ in range(count)])
    rebuilt = [reconstructor(shown.images, visible[:, place]) for place in range(visible.shape[1])]

    size = shown.images.shape[2:]
    inputs = _shown(shown.images, shown)
    grey = np.float32(HIDDEN if len(grid) > 1 else np.nan)  # of a signal, a gap in the curve
    seen = [middle_slice(at_pixels(visible[:, place], size)).movedim(1, -1).numpy() for place in range(len(rebuilt))]
    result = ReconstructResult(
        names=shown.names,
        inputs=inputs,
        masked=np.stack([np.where(of_mask, inputs, grey) for of_mask in seen], axis=1),
        predicted=np.stack([_shown(of_mask.predicted, shown) for of_mask in rebuilt], axis=1),
        pasted=np.stack([_shown(of_mask.pasted, shown) for of_mask in rebuilt], axis=1),
        visible=visible.numpy(),
        errors=np.stack([of_mask.errors.cpu().numpy() for of_mask in rebuilt], axis=1),
        unreadable=shown.unreadable,
        draw=draw_reconstructions,
        out=out,
    )
    if out is not None:
        write_picture(result.figure(settings["errors"]), out)
    return result


def _shown(images: Tensor, shown: Shown) -> Any:
    """Normalised `[B, C, *S]` to RGB in 0…1, `[B, H, W, 3]`; of signals, to `[B, length, C]` in the data's units."""
    if images.ndim == 3:
        values = images.detach().cpu().float().permute(0, 2, 1)  # [B, length, C]
        return (values * torch.tensor(shown.preparation.std) + torch.tensor(shown.preparation.mean)).numpy()
    return to_array(shown.tones(images))


# Drawing


@dataclass(frozen=True)
class _Cell:
    """A picture `[H, W, 3]`, or a heat map `[h, w]` with NaN where nothing is said; and what stands around it."""

    picture: Any
    title: str = ""
    note: str = ""


def draw_reconstructions(result: ReconstructResult, errors: bool = False) -> Figure:
    """A row per image: input, masked, reconstruction, and that with visible pixels pasted in.

    With several masks, the masks of an image side by side: what is seen in one row, what is rebuilt below. Signals are
    drawn as curves.

    Args:
        result: of `sparkmim.reconstruct`.
        errors: adds the error of each hidden patch as a heat map, or behind the curve.
    """
    if result.inputs.ndim == 3:
        return _draw_signals(result, errors)
    rows = [row for image in range(len(result.names)) for row in _rows(result, image, errors)]
    per_image = len(rows) // len(result.names)
    height, width = result.inputs.shape[1:3]
    figure = new_figure(
        len(rows[0]) * _CELL + (0.9 if errors else 0.3),
        len(rows) * (_CELL * height / width + 0.2) + 0.3,
        layout="constrained",
    )
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
                heat = show_heat(place, cell.picture, cell.title, _worst(result))
    for image, name in enumerate(result.names):
        axes[image * per_image, 0].set_ylabel(shortened(Path(name).name, 24), fontsize=8, parse_math=False)
    if heat is not None:
        _add_bar(figure, heat, axes)
    return figure


def _worst(result: ReconstructResult) -> float:
    """The error at which colours end."""
    return max(1.0, float(np.quantile(result.errors[~result.visible], 0.98)))


def _add_bar(figure: Figure, heat: Any, axes: Any) -> None:
    bar = figure.colorbar(heat, ax=axes, fraction=0.03, aspect=30, pad=0.01, extend="max", extendfrac=0.02)
    bar.set_label("error of a patch, in units of its variance", fontsize=8)
    bar.ax.tick_params(labelsize=7, length=0)
    bar.outline.set_visible(False)


def _rows(result: ReconstructResult, image: int, errors: bool) -> list[list[_Cell]]:
    """The cells of an image; column titles above the first image alone."""
    masks = result.visible.shape[1]
    losses = [f"loss {loss:.3f}" for loss in result.losses[image]]
    heat = [_heat(result, image, mask) for mask in range(masks)]

    def title(text: str) -> str:
        return "" if image else text

    if masks == 1:
        row = [
            _Cell(result.inputs[image], title("input")),
            _Cell(result.masked[image, 0], title("masked")),
            _Cell(result.predicted[image, 0], title("reconstruction")),
            _Cell(result.pasted[image, 0], title("with visible pixels"), losses[0]),
        ]
        return [[*row, _Cell(heat[0], title("error"))] if errors else row]
    names = [title(f"mask {mask + 1}") for mask in range(masks)]
    rows = [
        [_Cell(result.inputs[image], title("input")), *map(_Cell, result.masked[image], names)],
        [_Cell(None), *(map(_Cell, result.pasted[image], [""] * masks, losses))],
    ]
    return [*rows, [_Cell(None), *map(_Cell, heat)]] if errors else rows


def _heat(result: ReconstructResult, image: int, mask: int) -> Any:
    """Errors `[h, w]` of the hidden patches, NaN elsewhere; of volumes, of the slice that is shown."""
    hidden = np.where(result.visible[image, mask], np.nan, result.errors[image, mask])
    return hidden[len(hidden) // 2] if hidden.ndim == 3 else hidden


def show_heat(axes: Any, values: Any, title: str, worst: float) -> Any:
    """Draws `[h, w]` as colours; returns what a colour bar needs."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=9)
    return axes.imshow(np.ma.masked_invalid(values), cmap="inferno", vmin=0, vmax=worst, interpolation="nearest")


def _draw_signals(result: ReconstructResult, errors: bool) -> Figure:
    """A panel per signal and mask: the first channel as it is, and what is rebuilt where it is hidden."""
    greys = LinearSegmentedColormap.from_list("errors", ["#f4f4f4", "#9a9a9a"])  # on which both curves can be seen
    heat = ScalarMappable(Normalize(0, _worst(result)), greys)
    masks, length = result.visible.shape[1], result.inputs.shape[1]
    count = len(result.names) * masks
    figure = new_figure(8.0, 1.5 * count + 0.5, layout="constrained")
    panels = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    block = length // result.visible.shape[2]
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
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
