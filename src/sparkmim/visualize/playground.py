"""A page to hide patches of images on, and to see them rebuilt. The public function is in `sparkmim.commands`."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparkmim.data.source import images_source
from sparkmim.drawing.figures import sample_photograph
from sparkmim.errors import UserError
from sparkmim.visualize.playground_session import Playground, Refused
from sparkmim.visualize.reconstruct import Reconstructor

SAMPLES = 12
"""Pictures to pick from at most."""


def sample_images(images: Any, playground: Playground) -> list[str]:
    """Paths of pictures to pick from, spread evenly over what is given; those that can be read.

    Raises:
        ValueError: if there is none, or they are no files.
    """
    if images is None:
        return [sample_photograph()]
    source = images_source(images, playground.channels, 2)
    if source.arrays or not all(isinstance(item, str) for item in source.items[:1]):
        raise UserError("the playground picks from image files; give paths of images or folders")
    step = max(1, len(source.items) // SAMPLES)
    readable = []
    for path in source.items[::step][:SAMPLES]:
        with suppress(Refused):
            playground.open(path, playground.mask_ratio)
            readable.append(path)
    if not readable:
        raise UserError(f"none of the images can be read; the first is {source.items[0]}")
    return readable


def run_playground(settings: Mapping[str, Any]) -> None:
    """Runs `sparkmim.playground`.

    Args:
        settings: its arguments, as given.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs Gradio: `pip install 'sparkmim[playground]'`")
    if settings["max_megapixels"] <= 0:
        raise UserError(f"max_megapixels is {settings['max_megapixels']}; it must be above 0")
    if settings["port"] is not None and not 0 < settings["port"] < 2**16:
        raise UserError(f"port is {settings['port']}; ports run from 1 to 65535")
    files = [settings[name] for name in ("weights", "compare") if settings[name] is not None]
    models = [Reconstructor(file, settings["model"], settings["image_size"], settings["accelerator"]) for file in files]
    playground = Playground(models, round(1e6 * settings["max_megapixels"]))
    samples = sample_images(settings["images"], playground)
    page: Any = importlib.import_module("sparkmim.visualize.playground_page")  # needs Gradio
    with tempfile.TemporaryDirectory(prefix="sparkmim-playground-") as folder:
        page.serve(page.build_app(playground, samples, Path(folder)), settings["host"], settings["port"])
