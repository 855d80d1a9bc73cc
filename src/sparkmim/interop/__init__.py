"""Foreign weight formats."""

from sparkmim.interop import official

__all__ = ["official"]
