"""The playground as a Hugging Face Space: upload this folder, and beside it your weights and a few pictures.

WEIGHTS   weight file with a decoder: spark.safetensors of a run, or an original *_withdecoder_* file
COMPARE   another one to show beside it; optional
"""

from __future__ import annotations

import os
from pathlib import Path

import sparkmim

HERE = Path(__file__).parent

sparkmim.playground(
    weights=os.environ.get("WEIGHTS", HERE / "spark.safetensors"),
    compare=os.environ.get("COMPARE"),
    images=[str(HERE / "images")] if (HERE / "images").is_dir() else None,
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    max_megapixels=25,
)
