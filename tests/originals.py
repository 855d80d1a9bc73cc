"""Weight files in exactly the form of the original release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "official_checkpoint_keys.json").read_text())


def original_file(arch: str, folder: Path) -> Path:
    """A file in exactly the released form, with values that differ and can be computed with."""
    generator = torch.Generator().manual_seed(0)
    module: dict[str, Any] = {}
    for name, shape in PUBLISHED[arch]["module"].items():
        if name.endswith("num_batches_tracked"):
            module[name] = torch.tensor(7)
        elif name in ("imn_m", "imn_s", "norm_black"):
            module[name] = torch.zeros(shape)
        elif len(shape) > 1:
            module[name] = torch.randn(shape, generator=generator) / max(1, np.prod(shape[1:])) ** 0.5
        else:
            module[name] = 1 + 0.1 * torch.rand(shape, generator=generator)
    module["config"] = PUBLISHED[arch]["config"]
    content = dict.fromkeys(PUBLISHED[arch]["top_level_keys"])
    content |= {"args": "{}", "input_size": 224, "arch": arch, "epoch": 1599, "module": module, "is_pretrain": True}
    path = folder / f"{arch}{PUBLISHED[arch]['file_suffix']}"
    torch.save(content, path)
    return path
