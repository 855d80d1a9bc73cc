"""The playground command: models, sample images and the server, for `sparkmim.playground`."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sparkmim.data.source import images_source
from sparkmim.errors import UserError
from sparkmim.visualize.inputs import sample_photograph
from sparkmim.visualize.playground_session import Playground, Refused
from sparkmim.visualize.reconstruct import Reconstructor

SAMPLES = 12
"""Maximum number of images to pick from."""


def sample_images(images: Any, playground: Playground) -> list[str]:
    """Returns paths of readable images to pick from, spread evenly over those given; refuses if there is none."""
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


def run_playground(
    *,
    weights: str | Path,
    compare: str | Path | None,
    images: Any,
    model: Any,
    image_size: int | Sequence[int] | None,
    host: str,
    port: int | None,
    accelerator: str,
) -> None:
    """Runs `sparkmim.playground`."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs Gradio: `pip install 'sparkmim[playground]'`")
    files = [file for file in (weights, compare) if file is not None]
    models = [Reconstructor(file, model, image_size, accelerator) for file in files]
    playground = Playground(models)
    samples = sample_images(images, playground)
    page: Any = importlib.import_module("sparkmim.visualize.playground_page")  # needs Gradio
    with tempfile.TemporaryDirectory(prefix="sparkmim-playground-") as folder:
        page.serve(page.build_app(playground, samples, Path(folder)), host, port)
