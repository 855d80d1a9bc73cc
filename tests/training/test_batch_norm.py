"""BatchNorm over processes."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from processes import run
from sparkmim.models import create_encoder
from sparkmim.models.detector import create_detector
from sparkmim.models.pyramid import RegionBatchNorm
from sparkmim.training.batch_norm import CpuSyncBatchNorm, synchronised_batch_norm


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "efficientnet_b0"])
@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, CpuSyncBatchNorm])
def test_synchronised_networks_compute_the_same(name: str, kind: type[nn.Module]) -> None:
    """Activations within timm's BatchNorm included, and the modules are themselves again afterwards."""
    torch.manual_seed(0)
    model = create_encoder(name, drop_path=0.0).train()
    twin, images = copy.deepcopy(model), torch.rand(2, 3, 64, 64)
    kinds = {part: type(part) for part in model.modules()}
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    with synchronised_batch_norm(model, kind is nn.SyncBatchNorm):
        assert sum(isinstance(part, kind) for part in model.modules()) == norms > 0
        torch.testing.assert_close(model(images), twin(images), rtol=0, atol=0)
        torch.testing.assert_close(model.eval()(images), twin.eval()(images), rtol=0, atol=0)
    assert {part: type(part) for part in model.modules()} == kinds
    for (key, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


def test_a_detector_is_synchronised_and_what_is_frozen_stays_frozen() -> None:
    model: Any = create_detector(create_encoder("resnet18"), 2, norm="batch", box_head="4conv1fc")
    model.backbone.freeze(1)
    assert sum(isinstance(part, RegionBatchNorm) for part in model.modules()) == 8 + 8  # pyramid; a head each
    with synchronised_batch_norm(model, cuda=True):
        synchronised = [part for part in model.modules() if isinstance(part, nn.SyncBatchNorm)]
        assert len(synchronised) == 20 + 8 + 8
        model.eval()
        model.train()
        assert not model.backbone.encoder.bn1.training
        assert sum(not part.training for part in synchronised) == 1 + 4  # the stem; two blocks


class ScaledNorm(nn.BatchNorm2d):
    """Computes in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_norms_of_another_kind_are_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(ScaledNorm(3), nn.BatchNorm2d(3))
    with caplog.at_level(logging.WARNING, "sparkmim"), synchronised_batch_norm(model, cuda=True):
        assert [type(part) for part in model] == [ScaledNorm, nn.SyncBatchNorm]
    assert "statistics of ScaledNorm are not synchronised" in caplog.text


SCRIPT = """
import copy, os, sys
import torch
from torch import nn
from sparkmim.models import SparK, create_encoder
from sparkmim.models.pyramid import RegionBatchNorm
from sparkmim.training.batch_norm import CpuSyncBatchNorm, synchronised_batch_norm

torch.manual_seed(0)
model = SparK(create_encoder("mobilenetv3_small_050", drop_path=0.0), image_size=64, patch_size=32, decoder_width=32)
regions = nn.Sequential(RegionBatchNorm(3), nn.BatchNorm2d(3, momentum=None, affine=False))
models = nn.ModuleList([model, regions]).double().train()
alone = copy.deepcopy(models)
images, visible = torch.rand(4, 3, 64, 64).double(), torch.rand(4, 4).argsort(1).lt(2).view(4, 2, 2)
boxes = torch.rand(5, 3, 7, 7).double()

rank = 0 if os.fork() else 1
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)

with synchronised_batch_norm(models, cuda=False):
    part = slice(2 * rank, 2 * rank + 2)
    cubes = models[1](boxes if rank else boxes[:0]).pow(3).sum()  # one process has no regions
    (models[0](images[part], visible[part]).loss + 2 * cubes).backward()
trained = {name: parameter for name, parameter in models.named_parameters() if parameter.grad is not None}
for parameter in trained.values():
    torch.distributed.all_reduce(parameter.grad)
    parameter.grad /= 2
(alone[0](images, visible).loss + alone[1](boxes).pow(3).sum()).backward()
expected = dict(alone.named_parameters())
assert len(trained) > 100
for name, found in trained.items():
    torch.testing.assert_close(found.grad, expected[name].grad, rtol=1e-6, atol=1e-9, msg=name)
for (name, found), expected in zip(models.named_buffers(), alone.buffers(), strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=name)
torch.distributed.barrier()
if rank:
    os._exit(0)
assert os.wait()[1] == 0
"""


def test_two_processes_compute_as_one(tmp_path: Path) -> None:
    """Packed maps, the decoder, and regions that one process has none of; in float64."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run([sys.executable, "script.py", tmp_path / "meeting"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
