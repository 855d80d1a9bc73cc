"""Sparse engine: runs unmodified networks on the visible patches of masked images, exactly.

The files in reading order:

- `packed`: `PackedTensor`, which stores the visible patches and behaves as the dense map; looks up rules by name.
- `rules/`: what each tensor function does on packed tensors. `pointwise` and `kernels` (convolution, pooling) run
  nearly every network; `shape`, `reduction`, `resampling` and `attention` hold the rest.
- `layout`: `PatchLayout`, which patches are visible, and index tables of their neighbours.
- `gather`: convolution as a gather of rows and a matrix product; also into a dense map, for the decoder.
- `windows`: depthwise and narrow convolution, and pooling, by dense kernels.
- `masked`: `MaskedTensor`, the definition of a masked network, simple and slow.
- `verify`: compares a packed network with the dense one and with the definition.
"""

from sparkmim.sparse import definition as definition
from sparkmim.sparse import rules as rules
from sparkmim.sparse.gather import filled_convolution
from sparkmim.sparse.layout import PatchLayout
from sparkmim.sparse.masked import MaskedTensor, define, mask_map
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
    "MaskedTensor",
    "PackedTensor",
    "PatchLayout",
    "UnsupportedOperation",
    "define",
    "filled_convolution",
    "like",
    "mask_map",
    "naming_modules",
    "on_dense_map",
    "pack",
    "register_rule",
    "unpack",
]
