"""Pictures of what a model sees and rebuilds."""

from sparkmim.visualize.pictures import reconstruction_grid, to_pixels

__all__ = ["reconstruction_grid", "to_pixels"]
