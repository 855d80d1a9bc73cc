"""Pictures made up for the tests."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def checker(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Blocks of 8×8 in random colours, uint8 [h, w, 3]: they survive JPEG nearly unchanged."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand, for the kinds that Pillow can't write; every row starts with a zero byte."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
