"""BatchNorm over several processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparkmim.models.pyramid import RegionBatchNorm

log = logging.getLogger("sparkmim")


@contextmanager
def synchronised_batch_norm(module: nn.Module) -> Iterator[None]:
    """Makes BatchNorm compute its statistics over all processes, within the context.

    `convert_sync_batchnorm` of torch drops the activations in timm's `BatchNormAct2d`, and timm's own
    `convert_sync_batchnorm` makes new modules, which others may still refer to by the old ones (frozen stages do).
    Here modules stay the same objects. Subclasses with a `forward` of their own are left alone, with a warning.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    others: set[str] = set()
    for part in module.modules():
        kind = type(part)
        if not isinstance(part, _BatchNorm) or isinstance(part, nn.SyncBatchNorm):
            continue
        if kind.forward in (_BatchNorm.forward, RegionBatchNorm.forward):
            synchronised: type[_BatchNorm] = nn.SyncBatchNorm
        elif kind.forward is BatchNormAct2d.forward:
            synchronised = SyncBatchNormAct
        else:
            others.add(kind.__name__)
            continue
        changed.append((part, kind))
        part.__class__ = synchronised
        part.process_group = None  # type: ignore[assignment]  # of all processes
    if others:
        log.warning("statistics of %s are not synchronised: each GPU computes its own", ", ".join(sorted(others)))
    try:
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind
