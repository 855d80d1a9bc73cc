"""The playground command: models, sample images and the server, for `sparkmim.playground`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

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


def check_host(host: str) -> None:
    """Raises a `UserError` unless `host` is an address of this machine, at which Gradio would wait for ever."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no name of a machine"
        raise UserError(
            f"host {host} is no address of this machine ({reason}); choose another --host, such as 127.0.0.1 or 0.0.0.0"
        ) from error


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM, and SIGHUP where it is not ignored, act as Ctrl-C, so that what is temporary is removed."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if mine}
    before = {number: handler for number, handler in before.items() if handler == signal.SIG_DFL}

    def interrupt(number: int, frame: object) -> NoReturn:
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # while things are removed
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def visitors_folder() -> Iterator[Path]:
    """Yields a temporary folder for pictures of visitors; Gradio keeps what they send in it too."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="sparkmim-playground-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "sent")
        try:
            yield Path(folder)
        finally:
            del os.environ["GRADIO_TEMP_DIR"]
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


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
    check_host(host)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the playground needs Gradio: `pip install 'sparkmim[playground]'`")
    files = [file for file in (weights, compare) if file is not None]
    models = [Reconstructor(file, model, image_size, accelerator) for file in files]
    playground = Playground(models)
    samples = sample_images(images, playground)
    with ended_by_signals(), visitors_folder() as folder:
        page: Any = importlib.import_module("sparkmim.visualize.playground_page")  # needs Gradio
        page.serve(page.build_app(playground, samples, folder), host, port)
