"""TIFF files as arrays: of any number of channels, of integers and floats, in their own units."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

TIFF_SUFFIXES = (".tif", ".tiff")
"""Endings of TIFF files' names."""

_RGB, _CMYK = 2, 5
_ALPHA = (1, 2)
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_STRIPS, _STRIP_SIZES, _TILES, _TILE_SIZES = 273, 279, 324, 325
_NONE, _LZW, _DEFLATE, _ADOBE_DEFLATE, _PACKBITS, _ZSTD = 1, 5, 8, 32946, 32773, 50000
_NO_DATA = 42113  # of GDAL: a text


class Layout(NamedTuple):
    """What the first directory of a TIFF file says."""

    tags: Any
    height: int
    width: int
    bands: int
    kind: str  # numpy's type of values, with their byte order
    colour: int  # photometric interpretation
    extra: tuple[int, ...]  # meaning of the bands beyond the colours

    @property
    def is_picture(self) -> bool:
        """Whether it is a grey or colour picture, transparent or not, of 1 to 16 bits."""
        if self.kind[1:] not in ("u1", "u2"):
            return False
        transparent = self.extra[:1] and self.extra[0] in _ALPHA
        colours = {_RGB: 3, _CMYK: 4}.get(self.colour, 1)
        return self.bands == colours + (1 if transparent else 0) or (self.colour > _CMYK and self.bands == 3)


def layout_of(path: str | Path) -> Layout:
    """Reads the first directory of a TIFF file; raises whatever Pillow does, or a `ValueError`."""
    with Path(path).open("rb") as file:
        header = file.read(8)
        if header[2:3] == b"\x2b" or header[3:4] == b"\x2b":
            header += file.read(8)  # BigTIFF
        tags: Any = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
    bits = tags.get(258, (1,))
    form = tags.get(339, (_UNSIGNED,))
    if len({*bits}) > 1 or len({*form}) > 1:
        raise ValueError("its channels are of different types")
    letter = {_UNSIGNED: "u", _SIGNED: "i", _FLOAT: "f"}.get(form[0], "u")
    kind = f"{'<' if header[:2] == b'II' else '>'}{letter}{max(bits[0], 8) // 8}"
    return Layout(tags, tags[257], tags[256], tags.get(277, 1), kind, tags.get(262, 1), tuple(tags.get(338, ())))


def holds_array(path: str | Path) -> bool:
    """Whether a TIFF file holds what no 8-bit picture can: other channels than colours, floats, signed integers."""
    try:
        return not layout_of(path).is_picture
    except Exception:  # unreadable, which is told when it is read
        return False


def read_tiff(path: str | Path, max_pixels: int) -> npt.NDArray[Any]:
    """Reads a TIFF file as `[H, W, C]`; values that it declares as missing (GDAL's no-data) become NaN.

    Raises:
        ValueError: if it is of a form that is not read here, or cut.
    """
    found = layout_of(path)
    tags, (height, width) = found.tags, (found.height, found.width)
    if height * width * found.bands > 4 * max_pixels:
        raise ValueError(f"more than {4 * max_pixels // 1_000_000} million values")
    if found.kind[1:] not in ("u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8") or tags.get(258, (1,))[0] < 8:
        raise ValueError("its values are neither integers of 8 to 32 bits nor floats")
    tiled = _TILES in tags
    down, across = (tags[323], tags[322]) if tiled else (min(tags.get(278, height), height), width)
    planes = found.bands if tags.get(284, 1) == 2 else 1  # each band by itself
    depth = found.bands // planes
    starts, sizes = tags[_TILES if tiled else _STRIPS], tags[_TILE_SIZES if tiled else _STRIP_SIZES]
    array = np.zeros((height, width, found.bands), found.kind)
    places = (
        (plane, top, left)
        for plane in range(planes) for top in range(0, height, down) for left in range(0, width, across)
    )  # fmt: skip
    with Path(path).open("rb") as file:
        for (plane, top, left), start, size in zip(places, starts, sizes, strict=True):
            rows = down if tiled else min(down, height - top)
            file.seek(start)
            shape = (rows, across, depth)
            block = _block(file.read(size), tags.get(259, _NONE), tags.get(317, 1), shape, found.kind)
            part = array[top : top + rows, left : left + across, plane * depth : (plane + 1) * depth]
            part[:] = block[: part.shape[0], : part.shape[1]]
    missing = tags.get(_NO_DATA)
    if missing is not None:
        return np.where(array == float(str(missing).strip("\0 ")), np.nan, array).astype(np.float32)
    return array


def _block(data: bytes, compression: int, predictor: int, shape: tuple[int, int, int], kind: str) -> npt.NDArray[Any]:
    """Decodes a strip or tile to `[rows, columns, bands]`."""
    rows, columns, bands = shape
    item = np.dtype(kind).itemsize
    if compression in (_DEFLATE, _ADOBE_DEFLATE):
        data = zlib.decompressobj().decompress(data, rows * columns * bands * item)
    elif compression in (_LZW, _PACKBITS, _ZSTD):
        data = _by_pillow(data, compression, columns * bands * item, rows)
    elif compression != _NONE:
        raise ValueError(f"compression {compression} is not read; save it with LZW or deflate, or without")
    if len(data) < rows * columns * bands * item:
        raise ValueError("it ends too early")
    data = data[: rows * columns * bands * item]
    if predictor == 3:  # of floats: bytes of equal rank together, from the highest on, as differences
        plain = np.frombuffer(data, np.uint8).reshape(rows, item * columns, bands)
        summed = np.cumsum(plain, axis=1, dtype=np.uint8).reshape(rows, item, columns * bands)
        joined = np.ascontiguousarray(summed.transpose(0, 2, 1))
        return joined.view(f">{kind[1:]}").reshape(shape)
    values = np.frombuffer(data, kind).reshape(shape)
    return np.cumsum(values, axis=1, dtype=values.dtype) if predictor == 2 else values


def _by_pillow(data: bytes, compression: int, width: int, height: int) -> bytes:
    """Decompresses bytes by making them the strip of a grey picture of 8 bits."""
    tags = ((256, width), (257, height), (258, 8), (259, compression), (262, 1), (273, 8), (277, 1), (278, height),
            (279, len(data)))  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    with Image.open(io.BytesIO(content), formats=["TIFF"]) as image:
        return image.tobytes()
