"""Pictures made up for the tests."""

from __future__ import annotations

import numpy as np


def checker(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Blocks of 8×8 in random colours, uint8 [h, w, 3]: they survive JPEG nearly unchanged."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
