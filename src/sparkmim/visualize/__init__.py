"""Pictures of what models see and rebuild."""

from sparkmim.drawing.pixels import reconstruction_grid, to_pixels

__all__ = ["reconstruction_grid", "to_pixels"]
