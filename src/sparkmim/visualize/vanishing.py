"""Masks vanishing under dense convolution, for `sparkmim.explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sparkmim.data.inference import CROP, Preparation
from sparkmim.data.problems import counted
from sparkmim.drawing.figures import ACCENT, CONTRAST, new_figure, show_picture, write_picture
from sparkmim.drawing.pixels import Tones, at_pixels, to_array
from sparkmim.errors import UserError
from sparkmim.machine import device_named
from sparkmim.models import Hierarchy, create_encoder, random_visible
from sparkmim.models.encoders import own_module
from sparkmim.models.hierarchy import rank_of
from sparkmim.models.masking import patch_grid
from sparkmim.results import VanishingResult
from sparkmim.sparse import PackedTensor, PatchLayout, naming_modules, pack, unpack
from sparkmim.visualize.inputs import open_encoder, read_images, sample_photograph

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

LAYERS = (0, 1, 2, 4, 8, 16)
"""Numbers of convolutions after which shapes are shown; a ResNet-50 has 16 of 3×3."""

SIDE, PATCH = 64, 8
"""Side of a shape, and of a patch of the random mask among the shapes, in pixels."""

MOST_IMAGES, MASKS = 8, 8
"""Maximum number of images for measuring features, and random masks of each."""

ZERO = "#ebebeb"
"""Colour of hidden positions that are zero."""


@torch.no_grad()
def run_explanation(
    *,
    topic: str,
    out: str | Path | None,
    weights: str | Path | None,
    model: Any,
    images: Any,
    image_size: int | Sequence[int] | None,
    mask_ratio: float,
    seed: int,
    accelerator: str,
) -> VanishingResult:
    """Runs `sparkmim.explain`."""
    if topic != "vanishing":
        raise UserError(f"topic is {topic!r}; the only one is vanishing")
    generator = torch.Generator().manual_seed(seed)
    shapes = masked_shapes(mask_ratio, generator)
    if weights is None:
        network, hierarchy, preparation = _new_network(model, image_size, seed)
    else:
        encoder = open_encoder(weights, model, image_size, None, accelerator, _check_axes)
        network = _short(model or encoder.weights.metadata.model or "a network")
        network += f" with the weights of {Path(weights).resolve().name}"
        hierarchy, preparation = encoder.hierarchy, encoder.preparation
    device = device_named(accelerator)
    hierarchy.to(device)
    grid = patch_grid(preparation.image_size, hierarchy.patch_unit, hierarchy.patch_unit)
    if images is None:
        if preparation.channels not in (1, 3):
            raise UserError(f"{network} takes {preparation.channels} channels; name arrays of so many as --images")
        images = sample_photograph()
    shown = read_images(images, preparation, MOST_IMAGES, device)

    maps = {name: through_layers(visible, SIDE, seed) for name, visible in shapes.items()}
    if weights is None and not isinstance(model, nn.Module):
        calibrate(hierarchy, shown.images)
    masks = [random_visible(MASKS, grid, mask_ratio, generator).to(device) for _ in shown.names]
    drifts = [drift(hierarchy, image, visible) for image, visible in zip(shown.images, masks, strict=True)]
    first = at_pixels(torch.stack([visible[0] for visible in masks]), preparation.image_size)  # [n, 1, H, W]
    given = {
        "whole": shown.images,
        "visible": shown.images.movedim(1, -1)[first[:, 0]],
        "zeroed": shown.images * first,
    }
    result = VanishingResult(
        network=network,
        layers=list(LAYERS),
        shapes={name: kinds["dense"][0] for name, kinds in maps.items()},
        shares={
            name: {kind: of_layers.mean((1, 2)).tolist() for kind, of_layers in kinds.items()}
            for name, kinds in maps.items()
        },
        values={name: values.flatten().cpu().numpy() for name, values in given.items()},
        distances={
            kind: torch.stack([of_image[kind] for of_image in drifts]).mean(0).tolist() for kind in ("sparse", "dense")
        },
        draw=partial(
            draw_vanishing, maps=maps, image=shown.images[:1], visible=first[:1], tones=shown.tones,
            strides=hierarchy.strides,
        ),
        unreadable=shown.unreadable,
        out=None if out is None else Path(out),
    )  # fmt: skip
    write_picture(result)
    return result


def _new_network(model: Any, image_size: int | Sequence[int] | None, seed: int) -> tuple[str, Hierarchy, Preparation]:
    """Returns a network's name, feature maps and image preparation: with random weights, or those of a module."""
    encoder = own_module("resnet18" if model is None else model)
    name, with_weights = _short(encoder), ""
    if isinstance(encoder, str):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            encoder = create_encoder(encoder)
        with_weights = " with random weights"
    _check_axes(rank_of(encoder), name)
    size = image_size or 224
    axes = (size, size) if isinstance(size, int) else tuple(size)
    _check_axes(len(axes), f"image_size {list(axes)}")
    channels = next((module.in_channels for module in encoder.modules() if isinstance(module, _ConvNd)), 3)
    hierarchy = Hierarchy(encoder, channels, 2, axes).eval().requires_grad_(False)
    return name + with_weights, hierarchy, Preparation(axes, channels, None, None, CROP)


def _short(model: str | nn.Module) -> str:
    return model.rpartition("/")[2] if isinstance(model, str) else type(model).__name__


def _check_axes(axes: int, name: str) -> None:
    if axes != 2:
        raise UserError(f"{name} is for {axes} spatial axes, but the vanishing mask is shown on images of two")


# A mask under convolutions


def masked_shapes(mask_ratio: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns shapes with a patch per pixel, and a random mask of larger patches, bool `[*grid]`, true if visible."""
    from matplotlib.path import Path as Outline

    axis = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    points = torch.cartesian_prod(axis, axis).flip(1)  # x to the right and y down, in -1…1
    star = Outline.unit_regular_star(5, innerCircle=0.42).contains_points(points.numpy() * [1, -1] / 0.8)
    radius = points.norm(dim=1)
    return {
        "star": torch.from_numpy(star).view(SIDE, SIDE),
        "ring": ((radius > 0.48) & (radius < 0.68)).view(SIDE, SIDE),
        "patches": random_visible(1, (SIDE // PATCH, SIDE // PATCH), mask_ratio, generator)[0],
    }


def through_layers(visible: Tensor, side: int, seed: int = 0) -> dict[str, Any]:
    """Applies the same 3×3 convolutions to a mask, bool `[*grid]`, on a map of `side` pixels, dense and sparse.

    Returns for `dense` and `sparse` where the map is not zero after each of `LAYERS`, bool `[layers, side, side]`.
    """
    dense = at_pixels(visible[None], (side, side)).double()  # [1, 1, side, side]
    sparse = pack(dense, PatchLayout(visible[None]))
    found: dict[str, list[Tensor]] = {"dense": [dense], "sparse": [unpack(sparse)]}
    generator = torch.Generator().manual_seed(seed)
    for depth in range(1, max(LAYERS) + 1):
        # Positive weights around 1/9 and no bias: nothing cancels, so zero means untouched. Kernels for float64 only
        # multiply and add; those that transform tiles leave round-off in zeros.
        layer = nn.Conv2d(1, 1, 3, padding=1, bias=False, device="meta", dtype=torch.float64).to_empty(device="cpu")
        nn.init.uniform_(layer.weight, 0.5 / 9, 1.5 / 9, generator)
        dense, sparse = layer(dense), layer(sparse)
        if depth in LAYERS:
            found["dense"].append(dense)
            found["sparse"].append(unpack(sparse))
    return {kind: (torch.cat(of_layers)[:, 0] != 0).numpy() for kind, of_layers in found.items()}


# Values that a network computes


def calibrate(hierarchy: Hierarchy, images: Tensor) -> None:
    """Sets the running statistics of every BatchNorm to those of normalised images `[B, C, H, W]`."""
    norms = [norm for norm in hierarchy.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all calls: here, one
        norm.train()
    hierarchy(images)
    for norm in norms:
        norm.eval()


def drift(hierarchy: Hierarchy, image: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """Measures how far the features of a masked image are from those of the whole image.

    Compares each channel's distribution over positions and masks: under sparse convolution at visible positions, under
    dense convolution of the image with hidden patches set to zero at all positions, as a dense network cannot tell
    them apart.

    Args:
        hierarchy: feature maps of the encoder, in evaluation mode.
        image: normalised, `[C, H, W]`.
        visible: bool `[masks, *grid]`.

    Returns:
        `sparse` and `dense`: Kolmogorov–Smirnov distance to the whole image, averaged over channels,
        `[1 + stages]`: for the image itself, then for each feature map.
    """
    images = image.expand(len(visible), -1, -1, -1)
    zeroed = images * at_pixels(visible, image.shape[1:])
    inputs = {"sparse": pack(images, PatchLayout(visible)), "dense": zeroed}
    whole = [image[None], *hierarchy(image[None])]
    distances = {}
    for kind, x in inputs.items():
        with naming_modules(hierarchy.encoder):
            maps = [x, *hierarchy(x)]
        distances[kind] = torch.stack([_distance(map_, of_whole) for map_, of_whole in zip(maps, whole, strict=True)])
    return distances


def _distance(map_: Tensor, whole: Tensor) -> Tensor:
    """Returns the distance between the values of two maps `[B, C, H, W]`, averaged over channels.

    Values are rounded to a ten-thousandth of the channel's largest, so that round-off does not separate equal ones.
    """
    values = map_.values if isinstance(map_, PackedTensor) else map_  # of a packed map, the visible ones
    values, of_whole = (x.transpose(0, 1).flatten(1) for x in (values, whole))  # [C, positions]
    step = 1e-4 * of_whole.abs().amax(1, keepdim=True).clamp_min(1e-6)  # [C, 1]
    return kolmogorov_smirnov((values / step).round(), (of_whole / step).round()).mean()


def kolmogorov_smirnov(first: Tensor, second: Tensor) -> Tensor:
    """Returns the largest distance `[C]` between the distribution functions of samples `[C, m]` and `[C, n]`, in 0…1.

    Example:
        >>> kolmogorov_smirnov(torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([[0.0, 1]]))
        tensor([0.5000])
    """
    first, second = (sample.contiguous().sort(-1).values for sample in (first, second))
    steps = torch.cat([first, second], -1)  # [C, m + n], where one of the functions rises
    below = [torch.searchsorted(sample, steps, right=True) / sample.shape[-1] for sample in (first, second)]
    return (below[0] - below[1]).abs().amax(-1)


# The figure


def draw_vanishing(
    result: VanishingResult,
    maps: Mapping[str, Mapping[str, Any]],
    image: Tensor,
    visible: Tensor,
    tones: Tones,
    strides: Sequence[int],
) -> Figure:
    """Draws the shapes under convolutions; below, pixel values under a mask, and the drift of features.

    `maps` holds what `through_layers` returns, by shape; `image` `[1, C, H, W]` is an example, and `visible`, bool
    `[1, 1, H, W]`, its mask.
    """
    figure = new_figure(10, 11, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.9, 1])
    above, below = parts
    _draw_shapes(above, result, maps)
    left, right = below.subfigures(1, 2, width_ratios=[1.75, 1], wspace=0.03)
    _draw_values(left, result.values, image, visible, tones)
    _draw_drift(right, result, strides)
    return figure


def _title(part: SubFigure, text: str) -> None:
    part.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold")


def _plain(axes: Any, across: str, up: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)


def _draw_shapes(part: SubFigure, result: VanishingResult, maps: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws two rows per shape: a column per number of layers, and curves of the shares."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    _title(part, "A mask under 3×3 convolutions: share of positions that are not zero")
    colours = np.array([to_rgb(colour) for colour in (ZERO, CONTRAST, ACCENT)])
    columns = len(result.layers)
    cells = part.add_gridspec(2 * len(maps), columns + 1, width_ratios=[1] * columns + [2.4])
    for place, (name, shares) in enumerate(result.shares.items()):
        for row, kind in enumerate(("dense", "sparse"), start=2 * place):
            for column, (layers, share) in enumerate(zip(result.layers, shares[kind], strict=True)):
                axes = part.add_subplot(cells[row, column])
                filled = maps[name][kind][column]
                title = ("masked" if layers == 0 else counted(layers, "layer")) if row == 0 else ""
                show_picture(axes, colours[filled * (1 + result.shapes[name])], title, f"{share:.1%}")
                if column == 0:
                    axes.set_ylabel(f"{name}\n{kind}", fontsize=9)
        axes = part.add_subplot(cells[2 * place : 2 * place + 2, -1])
        _plain(axes, "layers" if place == len(maps) - 1 else "", "not zero, %")
        for kind, colour in (("dense", CONTRAST), ("sparse", ACCENT)):
            axes.plot(result.layers, [100 * share for share in shares[kind]], "o-", color=colour, label=kind, ms=4)
        axes.set_ylim(0, 105)
        axes.set_xticks(result.layers)
        if place == 0:
            axes.legend(frameon=False, fontsize=8, loc="center right")
    meaning = {ACCENT: "visible", CONTRAST: "hidden, but not zero any more", ZERO: "hidden and zero"}
    part.legend(
        handles=[Patch(color=colour, label=label) for colour, label in meaning.items()],
        loc="outside lower left", ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip


def _draw_values(part: SubFigure, values: Mapping[str, Any], image: Tensor, visible: Tensor, tones: Tones) -> None:
    """Draws an image whole, as sparse and as dense convolution see it, each above a histogram of pixel values."""
    _title(part, "What a network is given")
    whole = to_array(tones(image))[0]
    seen = visible[0, 0].cpu().numpy()[..., None]
    columns = {
        "whole": ("whole image", whole, "#777777"),
        "visible": ("sparse convolution:\nvisible patches alone", np.where(seen, whole, 1.0), ACCENT),
        "zeroed": ("dense convolution:\nhidden patches set to zero", to_array(tones(image * visible))[0], CONTRAST),
    }
    low, high = np.quantile(values["whole"], [0.001, 0.999])
    bins = np.linspace(min(low, -0.1), max(high, 0.1), 49)
    shares = {
        name: 100 * np.histogram(np.clip(of_name, bins[0], bins[-1]), bins)[0] / of_name.size
        for name, of_name in values.items()
    }
    top = 1.3 * max(shares["whole"].max(), shares["visible"].max())
    pictures, histograms = part.subplots(2, 3, height_ratios=[1.25, 1])
    for above, below, (name, (title, pixels, colour)) in zip(pictures, histograms, columns.items(), strict=True):
        show_picture(above, pixels, title)
        _plain(below, "pixel value, normalised", "share, %" if name == "whole" else "")
        below.stairs(shares[name], bins, fill=True, color=colour)
        if name != "whole":
            below.stairs(shares["whole"], bins, color="#444444", lw=0.8, label="whole image")
        below.set_ylim(0, top)
        if name == "visible":
            below.legend(frameon=False, fontsize=8)
        if shares[name].max() > top:
            after = bins[shares[name].argmax()] + bins[2] - bins[0]
            text = f" {shares[name].max():.0f}%\n in one bin"
            below.text(after, top, text, fontsize=8, color=colour, va="top")


def _draw_drift(part: SubFigure, result: VanishingResult, strides: Sequence[int]) -> None:
    """Draws distances by stage."""
    _title(part, "How far features drift")
    axes = part.subplots()
    _plain(axes, result.network.replace(" with ", "\nwith "), "KS distance to the whole image")
    labels = {"dense": "dense, hidden set to zero", "sparse": "sparse, visible alone"}
    for kind, colour in (("dense", CONTRAST), ("sparse", ACCENT)):
        axes.plot(result.distances[kind], "o-", color=colour, label=labels[kind], ms=4)
    axes.set_xticks(range(1 + len(strides)), ["image", *(f"stride {stride}" for stride in strides)])
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
