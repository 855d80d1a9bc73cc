"""The sparse engine: networks on the visible patches of masked images, unmodified and exact."""

from sparkmim.sparse import rules as rules
from sparkmim.sparse.layout import PatchLayout
from sparkmim.sparse.oracle import MaskedDense
from sparkmim.sparse.packed import (
    PackedTensor,
    UnsupportedOperation,
    like,
    naming_modules,
    on_dense_map,
    pack,
    register_rule,
    unpack,
)

__all__ = [
    "MaskedDense",
    "PackedTensor",
    "PatchLayout",
    "UnsupportedOperation",
    "like",
    "naming_modules",
    "on_dense_map",
    "pack",
    "register_rule",
    "unpack",
]
