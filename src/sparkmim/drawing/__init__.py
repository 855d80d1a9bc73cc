"""Tensors as colours, annotated images, figures and charts."""
