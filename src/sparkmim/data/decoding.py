"""Images as uint8 tensors: from files of any format and mode, and from items of data sets."""

from __future__ import annotations

import functools
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from sparkmim.arguments import MAX_MEGAPIXELS
from sparkmim.errors import UserError
from sparkmim.terminal import printable

try:
    # About a quarter faster than Pillow, with the same pixels. TorchVision has announced its removal.
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # pragma: no cover
    decode_jpeg = None

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "HEIF")
"""What files are read as. Pillow knows others, some of which start programs: Ghostscript for EPS."""

_EXIF_ORIENTATION, _SAMPLES_PER_PIXEL, _TILE_WIDTH, _TILE_LENGTH, _EXTRA_SAMPLES = 274, 277, 322, 323, 338
_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""

_ACCEPTED = (
    "a path, a PIL image, a uint8 or float tensor [C, H, W], a numpy array [H, W] or [H, W, C], "
    "or a tuple, list or dict with one of these first, or as 'image'"
)


_LIMIT = "SPARKMIM_MAX_MEGAPIXELS"
"""Environment variable of `images_up_to`: it reaches threads and loader workers, however they are started."""


class UnreadableImage(Exception):
    """A file, or an item of a data set, without a readable image; `path` may be the item's name."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{printable(self.path)}: {printable(self.reason)}"


def name_of(item: Any, place: int) -> str:
    """Returns the name of an item in messages: its path, if it is one."""
    return str(item) if isinstance(item, (str, Path)) else f"item {place}"


def to_image(item: Any, channels: int, name: str = "item") -> Tensor:
    """Returns the image in an item of a data set as uint8 `[channels, H, W]`.

    An item is a path, a PIL image, a uint8 or float tensor `[C, H, W]`, a numpy array `[H, W]` or `[H, W, C]`, or a
    tuple, list or dict with one of these first, or as `image`. Floats in [0, 1] stand for 0 to 255, and are rounded.
    Files and PIL images are converted to 1 or 3 channels; tensors and arrays must have this number.

    Raises:
        TypeError: if the item is of another type.
        UserError: if a tensor or array has another shape or range.
        UnreadableImage: if the file or PIL image cannot be read.
    """
    if isinstance(item, Mapping):
        if "image" not in item:
            raise TypeError(f"{name} is a dict of {', '.join(map(repr, item)) or 'nothing'}, without 'image'")
        item = item["image"]
    elif isinstance(item, (tuple, list)):
        if not item:
            raise TypeError(f"{name} is an empty {type(item).__name__}; accepted is {_ACCEPTED}")
        item = item[0]
    if isinstance(item, (str, Path)):
        return decode(item, channels)
    if isinstance(item, Image.Image):
        return from_pil(item, channels, name)
    if isinstance(item, np.ndarray):
        if item.ndim not in (2, 3):
            raise UserError(f"{name} is an array of shape {list(item.shape)}; images are [H, W] or [H, W, C]")
        pixels = torch.from_numpy(np.array(item))  # a copy: arrays may be read-only or flipped
        item = (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)
    elif not isinstance(item, Tensor):
        raise TypeError(f"{name} is of type {type(item).__name__}; accepted is {_ACCEPTED}")
    return _check_tensor(item.as_subclass(Tensor), channels, name)


def _check_tensor(image: Tensor, channels: int, name: str) -> Tensor:
    if image.ndim != 3 or image.numel() == 0:
        raise UserError(f"{name} is a tensor of shape {list(image.shape)}; images are [C, H, W]")
    if image.shape[0] != channels:
        hint = "; arrays are [H, W, C] and tensors [C, H, W]" if image.shape[-1] == channels else ""
        raise UserError(f"{name} has {image.shape[0]} channels, but channels is {channels}{hint}")
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise TypeError(f"{name} is of {image.dtype}; images are uint8, or float in [0, 1]")
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):  # so that NaN fails
        raise UserError(
            f"{name} has floats from {low:.3g} to {high:.3g}; they must lie in [0, 1]. "
            "Leave normalising to the transform"
        )
    return image.mul(255).round().to(torch.uint8)


def decode(path: str | Path, channels: int = 3, upright: bool = True) -> Tensor:
    """Reads an image as uint8 `[channels, H, W]`, upright by its EXIF orientation.

    The format is one of `FORMATS`, recognised by the content, not by the name. Other modes than 8-bit RGB and grey are
    converted:

    - grey is repeated to RGB, RGB weighted to grey (ITU-R 601 luma), palettes and CMYK are converted;
    - transparent pixels become white;
    - 16-bit grey is divided by 257 and rounded; 16-bit colour keeps its high bytes; 1-bit becomes 0 and 255;
    - 32-bit integers and floats have no known range: the image's own minimum becomes 0, its maximum 255;
    - of an animation or a multi-page file, the first frame is read.

    A JPEG that ends early is unreadable. One that is complete but damaged in the middle decodes to some picture, and no
    decoder reports it.

    Raises:
        UnreadableImage: if the file is missing, empty, truncated, corrupt, no image, or larger than `max_pixels`.
    """
    check_channels(channels)
    with open_picture(path) as image:
        if decode_jpeg is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            with suppress(RuntimeError):  # Pillow may read it, and has the clearer errors
                return _decode_jpeg(Path(path).read_bytes(), channels, upright)
        check_bands(image, path)
        if channels == 1:
            image.draft("L", image.size)  # a colour JPEG stores grey: torchvision takes it from there too
        pixels = _to_tensor(image, channels, upright)
        if image.format == "PNG" and _may_end_early(image) and _png_ends_early(path):
            raise UnreadableImage(path, "its data end before the last row")
        return pixels


def _may_end_early(image: Image.Image) -> bool:
    """Whether the last row is all zeros, which Pillow leaves where data are missing."""
    return not bool(np.array(image.crop((0, image.height - 1, image.width, image.height))).any())


def _png_ends_early(path: str | Path) -> bool:
    """Whether a PNG's data are complete as a stream, but fewer than its header says."""
    with Path(path).open("rb") as file:
        file.seek(8)
        inflating, found, row, height = zlib.decompressobj(), 0, 1, 0
        while header := file.read(8):
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IHDR":
                width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", file.read(13))
                if interlaced:
                    return False
                row = 1 + -(-width * depth * {2: 3, 4: 2, 6: 4}.get(colour, 1) // 8)
                length -= 13
            elif kind == b"IDAT":
                part, length = file.read(length), 0
                while part:
                    found += len(inflating.decompress(part, 2**20))
                    part = inflating.unconsumed_tail
            file.seek(length + 4, 1)  # and the checksum
    return bool(found + len(inflating.flush()) < row * height)


def check_bands(image: Image.Image, path: str | Path) -> None:
    """Raises `UnreadableImage` if a TIFF file has a fourth channel beside its colours that is no transparency."""
    if image.format == "TIFF" and image.mode in ("RGB", "RGBA"):
        tags = getattr(image, "tag_v2", {})
        channels, extra = tags.get(_SAMPLES_PER_PIXEL, 3), tags.get(_EXTRA_SAMPLES, ())
        if channels > 3 and (not extra or extra[0] not in (1, 2)):  # associated, or unassociated alpha
            raise UnreadableImage(path, f"holds {channels} channels, not a picture; --channels {channels} reads them")


@contextmanager
def open_picture(path: str | Path) -> Iterator[ImageFile]:
    """Opens an image file, of one of `FORMATS`, and reads its header; what fails in the context is unreadable.

    Raises:
        UnreadableImage: if it is no image, or larger than `max_pixels`.
    """
    with pillow_errors(path):
        check_regular(path)
        with Image.open(path, formats=_formats()) as image:
            if max(image.width * image.height, _tile_pixels(image)) > max_pixels():
                raise Image.DecompressionBombError
            yield image


def _tile_pixels(image: ImageFile) -> int:
    """Returns the size of a TIFF's tiles, each of which is decoded whole; 0 without tiles."""
    tags: Mapping[int, int] = getattr(image, "tag_v2", {})
    return int(tags.get(_TILE_WIDTH, 0)) * int(tags.get(_TILE_LENGTH, 0))


def check_regular(path: str | Path) -> None:
    """Raises an `UnreadableImage` if a path is no regular file, such as a pipe, which would keep us waiting."""
    mode, size = (found := Path(path).stat()).st_mode, found.st_size
    if not stat.S_ISREG(mode):
        raise UnreadableImage(path, "is a directory" if stat.S_ISDIR(mode) else "not a file")
    if not size:
        raise UnreadableImage(path, "the file is empty")


def max_pixels() -> int:
    """Returns the size of the largest image that is read: by its header, before memory is taken for its pixels.

    Bytes per pixel say nothing more: a white PNG of a scanner has a thousand pixels in each of its bytes.
    """
    return round(1e6 * float(os.environ.get(_LIMIT, MAX_MEGAPIXELS)))


@contextmanager
def images_up_to(megapixels: float) -> Iterator[None]:
    """Sets `max_pixels` within this context, for all threads, and for the processes that are started in it."""
    before = os.environ.get(_LIMIT)
    os.environ[_LIMIT] = str(megapixels)
    try:
        yield
    finally:
        os.environ.pop(_LIMIT)
        if before is not None:
            os.environ[_LIMIT] = before


@functools.cache
def _formats() -> list[str]:
    """Returns those of `FORMATS` that Pillow has here."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def stored_size(path: str | Path) -> tuple[tuple[int, int], bool]:
    """Returns stored height and width by an image's header, and whether its EXIF orientation swaps them.

    Raises:
        UnreadableImage: if it is no image, or larger than `max_pixels`.
    """
    with open_picture(path) as image:
        return (image.height, image.width), image.getexif().get(_EXIF_ORIENTATION) in _TURNED


def decode_annotated(path: str | Path, size: tuple[int, int], whose: str, channels: int = 3) -> Tensor:
    """Reads an annotated image as uint8 `[channels, *size]`.

    Some annotation tools ignore the EXIF orientation. If the upright image is not of the annotation's size, but the
    stored one is, the image is left as stored. If neither is, it is unreadable, by the size that `whose` gives.
    """
    image = decode(path, channels)
    upright = tuple(image.shape[1:])
    if upright != size:
        image = decode(path, channels, upright=False)
        if tuple(image.shape[1:]) != size:
            raise UnreadableImage(path, f"is {size_text(upright)}, but {whose} says {size_text(size)}")
    return image


def size_text(size: Sequence[int]) -> str:
    """Writes height and width as width×height: `640×480`."""
    return f"{size[1]}×{size[0]}"


def from_pil(image: Image.Image, channels: int = 3, name: str = "image") -> Tensor:
    """Converts a PIL image, which is loaded but not changed, to uint8 `[channels, H, W]`, as `decode` does."""
    check_channels(channels)
    with pillow_errors(name):
        return _to_tensor(image, channels)


def check_channels(channels: int) -> None:
    """Raises a `UserError` unless `channels` is 1 or 3."""
    if channels not in (1, 3):
        raise UserError(f"channels is {channels}; image files are read with 3 (RGB) or 1 (grey)")


def _decode_jpeg(encoded: bytes, channels: int, upright: bool) -> Tensor:
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    buffer = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)  # torch wants it writable
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
    except Exception:  # broken EXIF data give no orientation
        return image


def _to_8_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    """Scales modes of more than 8 bits, which Pillow's own conversion would clip."""
    if not image.mode.startswith(("I", "F")):
        return image
    if _has_16_bits(image, file_format):
        levels = np.array(image).astype(np.int32)  # [h, w]
        levels += 128  # in place, as an image may be large; 257 is odd, so there are no ties
        levels //= 257
        return Image.fromarray(levels.astype(np.uint8))
    values = np.array(image).astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) * (255 / ((high - low) or 1))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _has_16_bits(image: Image.Image, file_format: str | None) -> bool:
    # Older Pillow reads 16-bit PNG as mode I, all read 16-bit PGM so.
    return image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))


def highest_of_16_bits(path: str | Path) -> int | None:
    """Returns the highest value of an image file of 16-bit grey; None for others.

    Raises:
        UnreadableImage: if it cannot be read.
    """
    with open_picture(path) as image:
        return int(np.array(image).max()) if _has_16_bits(image, image.format) else None


_lock = threading.Lock()
_inside = 0
_outside = ExitStack()


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Limits images to `max_pixels`, and silences decoders' warnings. It is reentrant, and safe for threads."""
    # Pillow takes its limit from a global alone (TIFF files ask for it as late as when pixels are loaded), and filters
    # of warnings are global too: the first thread to enter sets both, and the last to leave restores them.
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _outside.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            Image.MAX_IMAGE_PIXELS = max_pixels() // 2  # Pillow warns from here on, and raises at twice as many
            _outside.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _outside.close()


@contextmanager
def pillow_errors(path: str | Path) -> Iterator[None]:
    """Makes Pillow strict, and any of its errors an `UnreadableImage`."""
    with strict_pillow():
        try:
            yield
        except (UserError, UnreadableImage):
            raise
        except UnidentifiedImageError as error:
            raise UnreadableImage(path, "not an image of a known format") from error
        except Image.DecompressionBombError as error:
            raise UnreadableImage(path, f"larger than {max_pixels() / 1e6:g} megapixels (--max-megapixels)") from error
        except OSError as error:
            raise UnreadableImage(path, error.strerror or str(error)) from error
        except Exception as error:  # decoders raise anything, from SyntaxError to struct.error
            raise UnreadableImage(path, str(error) or type(error).__name__) from error
