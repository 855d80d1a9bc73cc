"""sparkmim: self-supervised pretraining of any convolutional network.

The public names load on first use, so that importing the package, or asking the command line for help, is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparkmim._version import __version__

if TYPE_CHECKING:
    from sparkmim.commands import detect as detect
    from sparkmim.commands import embed as embed
    from sparkmim.commands import evaluate as evaluate
    from sparkmim.commands import explain as explain
    from sparkmim.commands import export as export
    from sparkmim.commands import features as features
    from sparkmim.commands import finetune as finetune
    from sparkmim.commands import neighbors as neighbors
    from sparkmim.commands import playground as playground
    from sparkmim.commands import predict as predict
    from sparkmim.commands import pretrain as pretrain
    from sparkmim.commands import reconstruct as reconstruct
    from sparkmim.commands import report as report
    from sparkmim.commands import segment as segment
    from sparkmim.commands import statistics as statistics
    from sparkmim.commands import verify as verify
    from sparkmim.commands import weights as weights
    from sparkmim.errors import UserError as UserError
    from sparkmim.interop.weights import load
    from sparkmim.models import SparK as SparK


_HOME = {
    "SparK": "sparkmim.models",
    "UserError": "sparkmim.errors",
    "verify": "sparkmim.commands",
    "finetune": "sparkmim.commands",
    "pretrain": "sparkmim.commands",
    "detect": "sparkmim.commands",
    "evaluate": "sparkmim.commands",
    "predict": "sparkmim.commands",
    "embed": "sparkmim.commands",
    "statistics": "sparkmim.commands",
    "export": "sparkmim.commands",
    "weights": "sparkmim.commands",
    "explain": "sparkmim.commands",
    "features": "sparkmim.commands",
    "neighbors": "sparkmim.commands",
    "playground": "sparkmim.commands",
    "reconstruct": "sparkmim.commands",
    "report": "sparkmim.commands",
    "segment": "sparkmim.commands",
    "load": "sparkmim.interop.weights",
}

__all__ = [
    "SparK",
    "UserError",
    "__version__",
    "detect",
    "embed",
    "evaluate",
    "explain",
    "export",
    "features",
    "finetune",
    "load",
    "neighbors",
    "playground",
    "predict",
    "pretrain",
    "reconstruct",
    "report",
    "segment",
    "statistics",
    "verify",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'sparkmim' has no attribute {name!r}")
