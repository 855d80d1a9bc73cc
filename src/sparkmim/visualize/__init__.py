"""Pictures of what a model sees and rebuilds."""

from sparkmim.drawing.pixels import reconstruction_grid, to_pixels

__all__ = ["reconstruction_grid", "to_pixels"]
