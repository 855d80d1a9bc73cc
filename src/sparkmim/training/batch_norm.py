"""BatchNorm over several processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparkmim.models.pyramid import RegionBatchNorm

log = logging.getLogger("sparkmim")


class _Total(torch.autograd.Function):
    """Sums a tensor over all processes; so does its gradient, as each process has a loss of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total: Tensor = _Total.apply(grads[0])
        return total


class CpuSyncBatchNorm(_BatchNorm):
    """What PyTorch's `SyncBatchNorm` computes, on CPUs; that one runs on GPUs only."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, *S]` to the same shape; N may be 0, on all processes too."""
        if not (self.training and torch.distributed.is_initialized()):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return self._over_processes(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    def _over_processes(self, x: Tensor) -> Tensor:
        axes, shape = [0, *range(2, x.ndim)], [-1, *[1] * (x.ndim - 2)]
        sums = _Total.apply(torch.cat([x.sum(axes), x.new_tensor([x.numel() // x.shape[1]])]))
        count = sums[-1].detach().clamp(min=1)
        mean = sums[:-1] / count
        x = x - mean.view(shape)
        variance = _Total.apply(x.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None and count > 1:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)
        x = x * (variance + self.eps).rsqrt().view(shape)
        return x if self.weight is None else x * self.weight.view(shape) + self.bias.view(shape)


class CpuSyncBatchNormAct(CpuSyncBatchNorm):
    """What timm's `SyncBatchNormAct` computes, on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        part: Any = self  # with the attributes of a BatchNormAct2d
        out: Tensor = part.act(part.drop(super().forward(x)))
        return out


@contextmanager
def synchronised_batch_norm(module: nn.Module, cuda: bool) -> Iterator[None]:
    """Makes BatchNorm compute its statistics over all processes, on GPUs or on CPUs, within the context.

    `convert_sync_batchnorm` of torch drops the activations in timm's `BatchNormAct2d`, and timm's own
    `convert_sync_batchnorm` makes new modules, which others may still refer to by the old ones (frozen stages do).
    Here modules stay the same objects. Subclasses with a `forward` of their own are left alone, with a warning.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    others: set[str] = set()
    for part in module.modules():
        kind = type(part)
        if not isinstance(part, _BatchNorm) or isinstance(part, nn.SyncBatchNorm | CpuSyncBatchNorm):
            continue
        if kind.forward in (_BatchNorm.forward, RegionBatchNorm.forward):
            synchronised: type[_BatchNorm] = nn.SyncBatchNorm if cuda else CpuSyncBatchNorm
        elif kind.forward is BatchNormAct2d.forward:
            synchronised = SyncBatchNormAct if cuda else CpuSyncBatchNormAct
        else:
            others.add(kind.__name__)
            continue
        changed.append((part, kind))
        part.__class__ = synchronised
        part.process_group = None  # type: ignore[assignment]  # of all processes
    if others:
        log.warning("statistics of %s are not synchronised: each process computes its own", ", ".join(sorted(others)))
    try:
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind
