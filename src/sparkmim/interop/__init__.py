"""Foreign weight formats."""
