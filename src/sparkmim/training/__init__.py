"""Training: settings, recipes and schedules; the Lightning modules and callbacks; the four trainings."""

from __future__ import annotations

from typing import Any

__all__ = ["layer_decay_exponents"]


def __getattr__(name: str) -> Any:
    """Loads a public name on first use, so that reading recipes imports nothing heavy."""
    if name in __all__:
        from sparkmim.training import layer_decay

        return getattr(layer_decay, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
