"""TIFF files of many channels and types, as arrays."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparkmim.data.arrays import read_array
from sparkmim.data.decoding import UnreadableImage, decode
from sparkmim.data.source import Source, open_source
from sparkmim.data.tiff import holds_array

RGB, CMYK = 2, 5


def write_tiff(
    path: Path, array: np.ndarray, colour: int = 1, extra: list[int] | None = None, rows: int | None = None,
    tile: int | None = None, planar: bool = False, compression: int = 1, predictor: int = 1, no_data: str | None = None,
    order: str = "<",
) -> Path:  # fmt: skip
    """Writes `[H, W, C]` as TIFF, in strips of `rows`, or tiles of `tile` squared."""
    array = array.astype(array.dtype.newbyteorder(order))
    height, width, bands = array.shape
    down, across = (tile, tile) if tile else (rows or height, width)
    blocks = []
    for part in np.split(array, bands, axis=2) if planar else [array]:
        for top in range(0, height, down):
            for left in range(0, width, across):
                block = part[top : top + down, left : left + across]
                if tile:
                    gaps = [(0, side - have) for side, have in zip((tile, tile), block.shape, strict=False)]
                    block = np.pad(block, [*gaps, (0, 0)])
                if predictor == 2:
                    block = np.diff(block, axis=1, prepend=block[:, :1] * 0).astype(array.dtype)
                elif predictor == 3:
                    size = block.dtype.itemsize
                    planes = block.astype(block.dtype.newbyteorder(">")).view(np.uint8)
                    planes = planes.reshape(block.shape[0], -1, size).transpose(0, 2, 1)
                    planes = planes.reshape(block.shape[0], -1, block.shape[2])
                    block = np.diff(planes, axis=1, prepend=planes[:, :1] * 0)
                data = np.ascontiguousarray(block).tobytes()
                blocks.append(
                    zlib.compress(data) if compression == 8 else packed(data) if compression == 32773 else data
                )
    starts = np.cumsum([8, *map(len, blocks)])[:-1].tolist()
    sizes = [len(block) for block in blocks]
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    tags: dict[int, tuple[str, Any]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [8 * array.dtype.itemsize] * bands),
        259: ("H", [compression]), 262: ("H", [colour]), 277: ("H", [bands]), 284: ("H", [2 if planar else 1]),
        317: ("H", [predictor]), 339: ("H", [kind] * bands),
    }  # fmt: skip
    tags |= {322: ("I", [tile]), 323: ("I", [tile]), 324: ("I", starts), 325: ("I", sizes)} if tile else {
        273: ("I", starts), 278: ("I", [down]), 279: ("I", sizes)}  # fmt: skip
    if extra is not None:
        tags[338] = ("H", extra)
    content = b"".join(blocks)
    where = 8 + len(content)
    beyond, entries = b"", b""
    if no_data is not None:
        tags[42113] = ("s", no_data.encode() + b"\0")
    for tag, (form, values) in sorted(tags.items()):
        raw = values if form == "s" else struct.pack(f"{order}{len(values)}{form}", *values)
        entries += struct.pack(f"{order}HHI", tag, {"s": 2, "H": 3, "I": 4}[form], len(values))
        if len(raw) <= 4:
            entries += raw.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", where + 2 + 12 * len(tags) + 4 + len(beyond))
            beyond += raw
    mark = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    path.write_bytes(mark + struct.pack(f"{order}I", where) + content + directory + beyond)
    return path


def packed(data: bytes) -> bytes:
    """PackBits, of literal runs alone."""
    return b"".join(bytes([len(data[at : at + 128]) - 1]) + data[at : at + 128] for at in range(0, len(data), 128))


def values(kind: str, bands: int) -> np.ndarray:
    found = np.random.default_rng(bands).normal(700, 300, (21, 19, bands))
    return found.astype(kind) if kind[0] == "f" else found.astype("i8").astype(kind)


@pytest.mark.parametrize(
    ("kind", "bands"), [("u1", 5), ("u2", 4), ("f4", 3), ("f4", 1), ("i2", 2), ("f8", 2), ("u4", 1)]
)
@pytest.mark.parametrize(
    "form",
    [
        {}, {"rows": 4}, {"tile": 16}, {"planar": True, "rows": 8}, {"compression": 8, "predictor": 2, "rows": 5},
        {"compression": 32773}, {"order": ">", "rows": 7}, {"tile": 16, "planar": True, "compression": 8},
    ],
)  # fmt: skip
def test_values_are_what_was_written(tmp_path: Path, kind: str, bands: int, form: dict[str, Any]) -> None:
    array = values(kind, bands)
    if kind[0] == "f" and form.get("predictor"):
        form = form | {"predictor": 3}
    path = write_tiff(tmp_path / "a.tif", array, extra=[0] * (bands - 1), **form)
    assert holds_array(path)
    np.testing.assert_array_equal(read_array(path), array)


def test_lzw(tmp_path: Path) -> None:
    """Pillow writes it for pictures alone."""
    grey = values("u1", 1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.tif", compression="tiff_lzw")
    np.testing.assert_array_equal(read_array(tmp_path / "a.tif")[..., 0], grey)


def test_no_data(tmp_path: Path) -> None:
    heights = values("f4", 1)
    heights[3:5] = -9999
    found = read_array(write_tiff(tmp_path / "a.tif", heights, no_data="-9999"))
    assert np.isnan(found[3:5]).all()
    np.testing.assert_array_equal(found[5:], heights[5:])


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", values("f4", 3))
    entry = struct.pack("<HHII", 259, 3, 1, 1)
    path.write_bytes(path.read_bytes().replace(entry, struct.pack("<HHII", 259, 3, 1, 7)))
    with pytest.raises(UnreadableImage, match="compression 7 is not read; save it with LZW or deflate"):
        read_array(path)
    (tmp_path / "b.tif").write_bytes(write_tiff(tmp_path / "c.tif", values("f4", 3)).read_bytes()[:900])
    with pytest.raises(UnreadableImage):
        read_array(tmp_path / "b.tif")
    assert not holds_array(tmp_path / "b.tif")


@pytest.mark.parametrize("extra", [None, [0]])
def test_near_infrared_is_no_transparency(tmp_path: Path, extra: list[int] | None) -> None:
    """A fourth channel is read as one, or refused by name; transparency and CMYK only where the file says so."""
    array = np.full((8, 8, 4), [100, 100, 100, 40], np.uint8)
    path = write_tiff(tmp_path / "a.tif", array, RGB, extra)
    source = open_source(str(tmp_path), 4, 2)
    assert source.arrays
    assert source.read(source.items[0])[:, 0, 0].tolist() == [100, 100, 100, 40]
    with pytest.raises(ValueError, match=r"a\.tif: is of shape \[8, 8, 4\]; for channels 3 "):
        open_source(str(tmp_path), 3, 2)
    with pytest.raises(UnreadableImage, match="holds 4 channels, not a picture; --channels 4 reads them"):
        decode(path)
    assert decode(write_tiff(path, array, RGB, [2]))[:, 0, 0].tolist() == [231] * 3
    assert decode(write_tiff(path, array, CMYK))[:, 0, 0].tolist() == [131] * 3
    assert not Source.of([str(path)], 3, 2).arrays


@pytest.mark.parametrize(
    ("kind", "bands", "arrays"),
    [
        ("f4", 1, True), ("f4", 3, True), ("i2", 1, True), ("u1", 3, False), ("u2", 1, False), ("u2", 3, False),
        ("u1", 1, False),
    ],
)  # fmt: skip
def test_pictures_stay_pictures(tmp_path: Path, kind: str, bands: int, arrays: bool) -> None:
    array = values(kind, bands)
    write_tiff(tmp_path / "a.tif", array, RGB if bands == 3 else 1)
    source = open_source(str(tmp_path), bands, 2)
    assert source.arrays == arrays
    if arrays:
        assert source.statistics().mean == pytest.approx(array.mean((0, 1)), rel=1e-5)
