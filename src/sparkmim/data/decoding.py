"""From an image file to a uint8 tensor, whatever the format and the mode."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sparkmim.errors import UserError

try:
    # About a quarter faster than Pillow, with the same pixels. TorchVision has announced that it will go.
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # pragma: no cover
    decode_jpeg = None

MAX_PIXELS = 500_000_000
"""Larger images count as unreadable: a small file can claim a size that fills the memory."""

_EXIF_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""


class UnreadableImage(Exception):
    """A file, or an item of a dataset, that holds no readable image.

    Attributes:
        path: which one.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode(path: str | Path, channels: int = 3, upright: bool = True) -> Tensor:
    """Reads an image as uint8 `[channels, H, W]`, upright by its EXIF orientation.

    The content tells the format, not the name. What is not 8-bit RGB or grey becomes so:

    - grey is repeated to RGB, RGB weighted to grey (ITU-R 601 luma), palettes and CMYK are converted;
    - what is transparent shows white;
    - 16-bit grey is divided by 257 and rounded; 16-bit colour keeps its high bytes; 1-bit becomes 0 and 255;
    - 32-bit integers and floats have no known range: the image's own minimum becomes 0, its maximum 255;
    - of an animation or a multi-page file, the first frame counts.

    A JPEG that ends early is unreadable. One that is damaged in the middle, but complete, is not: it decodes to
    some picture, and no decoder tells.

    Args:
        path: the file.
        channels: 3 for RGB, 1 for grey.
        upright: turned by its EXIF orientation; else as it is stored.

    Raises:
        ValueError: if `channels` is neither 1 nor 3.
        UnreadableImage: if the file is missing, empty, truncated, corrupt, no image, or of more than
            `MAX_PIXELS` pixels.
    """
    check_channels(channels)
    try:
        encoded = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UnreadableImage(path, getattr(error, "strerror", None) or str(error)) from error
    if not encoded:
        raise UnreadableImage(path, "the file is empty")
    with strict_pillow():
        try:
            with Image.open(io.BytesIO(encoded)) as image:  # reads the header only
                if decode_jpeg is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
                    with suppress(RuntimeError):  # Pillow may know better, and has the clearer errors
                        return _decode_jpeg(encoded, channels, upright)
                if channels == 1:
                    image.draft("L", image.size)  # grey is stored in a colour JPEG: torchvision takes it from there too
                return _to_tensor(image, channels, upright)
        except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
            raise UnreadableImage(path, reason_of(error)) from error


def pixels_of(path: str | Path) -> int:
    """How many pixels an image has by its header; none of them is decoded.

    Raises:
        UnreadableImage: if it is no image, or of more than `MAX_PIXELS` pixels.
    """
    with strict_pillow():
        (height, width), _ = stored_size(path)
    return height * width


def stored_size(path: str | Path) -> tuple[tuple[int, int], bool]:
    """Height and width of an image as it is stored, by its header, and whether its EXIF orientation swaps them.

    To be called within `strict_pillow`, which concerns all threads.

    Raises:
        UnreadableImage: if it is no image, or of more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path) as image:
            return (image.height, image.width), image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    except Exception as error:
        raise UnreadableImage(path, reason_of(error)) from error


def decode_annotated(path: str | Path, size: tuple[int, int], whose: str, channels: int = 3) -> Tensor:
    """Reads an image that somebody has annotated, uint8 `[channels, *size]`.

    It is turned upright by its EXIF orientation, as they saw it. Some annotate with tools that ignore it; there, only
    the image as it is stored has the size that the annotation has, and so it is not turned.

    Args:
        path: the file.
        size: height and width that the annotation has.
        whose: what a complaint calls the annotation.
        channels: as for `decode`.

    Raises:
        UnreadableImage: if it cannot be decoded, or is of another size.
    """
    image = decode(path, channels)
    upright = tuple(image.shape[1:])
    if upright != size:
        image = decode(path, channels, upright=False)
        if tuple(image.shape[1:]) != size:
            raise UnreadableImage(path, f"is {size_text(upright)}, but {whose} says {size_text(size)}")
    return image


def size_text(size: Sequence[int]) -> str:
    """Height and width as people write them.

    Example:
        >>> size_text((480, 640))
        '640×480'
    """
    return f"{size[1]}×{size[0]}"


def from_pil(image: Image.Image, channels: int = 3, name: str = "image") -> Tensor:
    """The same for an image that Pillow holds already, loaded or not: uint8 `[channels, H, W]`.

    Args:
        image: not changed, but loaded.
        channels: 3 for RGB, 1 for grey.
        name: what an error calls it.

    Raises:
        ValueError: if `channels` is neither 1 nor 3.
        UnreadableImage: if it can't be loaded, or its mode not be converted.
    """
    check_channels(channels)
    with strict_pillow():
        try:
            return _to_tensor(image, channels)
        except Exception as error:
            raise UnreadableImage(name, reason_of(error)) from error


def check_channels(channels: int) -> None:
    """Raises a ValueError unless `channels` is 1 or 3."""
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}; image files are read with 3 (RGB) or 1 (grey)")


def _decode_jpeg(encoded: bytes, channels: int, upright: bool) -> Tensor:
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    # torch wants a writable buffer
    buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    decoded: Tensor = decode_jpeg(buffer, mode=mode, apply_exif_orientation=upright)
    return decoded


def _to_tensor(image: Image.Image, channels: int, upright: bool = True) -> Tensor:
    image.load()
    image = _to_8_bit(_upright(image) if upright else image, image.format)
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, channels)
    # Channels stay last in memory, where torchvision resizes fastest.
    return pixels.permute(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data says nothing about the orientation
        return image


def _to_8_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """Scales the modes of more than 8 bits, which Pillow's own conversion would clip."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.array(image).astype(np.float64)  # [h, w]
    # Older Pillow reads 16-bit PNG as mode I, all read 16-bit PGM so.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        scaled = values / 257
    else:
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / ((high - low) or 1))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Sets Pillow's guard against decompression bombs to `MAX_PIXELS`, and keeps all decoders' warnings in."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns from here on, and raises at twice as many
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def reason_of(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS // 1_000_000} million pixels"
    return str(error) or type(error).__name__
