"""One small network of every family of timm that is exact: in float64 while training, in float32 as it is used."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from sparkmim.models import Hierarchy, create_encoder, random_visible, verify_encoder
from sparkmim.sparse import PatchLayout, mask_map, pack, unpack

MEMBERS = [
    "test_byobnet", "convmixer_1024_20_ks9_p14", "test_convnext", "convnextv2_atto", "cpubone_nano",
    "cs3darknet_focus_s", "cspnext_tiny", "densenet121", "dla34", "dpn48b", "test_efficientnet",
    "tf_efficientnet_b0", "efficientnet_cc_b0_4e", "efficientvit_b0", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "ghostnet_050", "ghostnetv2_100", "hardcorenas_b", "hgnetv2_b0", "hrnet_w18_small",
    "iformer_t", "inception_next_atto", "lcnetv2_small", "lowformer_b0", "test_mambaout", "poolformerv2_s12",
    "lcnet_035", "test_nfnet", "mobilenetv5_base", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1",
    "res2next50", "resnest14d", "test_resnet", "gcresnext26ts", "resnetv2_18", "resnetv2_50d_frn",
    "resnetv2_50d_evos", "rexnet_100", "selecsls42", "legacy_seresnet18", "skresnet18", "starnet_s050",
    "swiftformer_xs", "tresnet_m", "vgg11", "ese_vovnet19b_slim_dw", "xception41p",
]  # fmt: skip


def encoder_named(name: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's remarks on renamed models
        return create_encoder(name)


@pytest.mark.parametrize("name", MEMBERS)
def test_exact(name: str) -> None:
    """Forward and backward, in float64 and training mode, whole and under two masks."""
    report = verify_encoder(encoder_named(name))
    assert report.exact, report.message


Result = tuple[list[Tensor], Tensor]


def run(hierarchy: Hierarchy, images: Tensor, visible: Tensor, packed: bool) -> Result:
    """Maps, zero where masked, and all gradients as one vector."""
    if packed:
        maps = [unpack(map_) for map_ in hierarchy(pack(images, PatchLayout(visible)))]
    else:
        maps = [map_.values for map_ in hierarchy(mask_map(images, PatchLayout(visible)))]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(map_.shape, generator=generator).to(map_.dtype) for map_ in maps]
    total = torch.stack([(map_ * weight).sum() for map_, weight in zip(maps, weights, strict=True)]).sum()
    grads = torch.autograd.grad(total, list(hierarchy.parameters()), allow_unused=True)
    return [map_.detach() for map_ in maps], torch.cat([grad.flatten() for grad in grads if grad is not None])


def errors(found: Result, true: Result) -> tuple[float, float]:
    """Relative, by L2 norm: the worst map's, and that of the gradient."""
    forward = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found[0], true[0], strict=True)]
    return max(forward), ((found[1] - true[1]).norm() / true[1].norm()).item()


NORMALISED_AFTER_ACTIVATION = ("convmixer_1024_20_ks9_p14", "repvit_m1")
"""Those whose maps go from one normalisation to the next."""


@pytest.mark.parametrize("name", MEMBERS)
def test_in_single_precision(name: str) -> None:
    """Maps to 1e-5 and gradients to 1e-4 of the definition in float64, with statistics as after training.

    A ReLU whose input is zero up to rounding moves the gradient of one draw by more, so it must hold for one of
    three; a wrong rule is wrong in all.
    """
    hierarchy = Hierarchy(encoder_named(name)).train()
    size = 3 * hierarchy.patch_unit
    for module in hierarchy.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
        if "Norm" in type(module).__name__ or "Filter" in type(module).__name__:
            # Dozens of ReLUs on values around zero, without shortcuts, amplify rounding a thousandfold, in the
            # definition as well. Around two they do not; but in maps that are normalised again, without a ReLU
            # between, a large mean is itself what amplifies it.
            bias = getattr(module, "bias", None)
            if bias is not None and name not in NORMALISED_AFTER_ACTIVATION:
                nn.init.constant_(bias, 2.0)
    with torch.no_grad():
        hierarchy(torch.randn(4, 3, size, size))  # sets running statistics
    hierarchy.eval()
    double = copy.deepcopy(hierarchy).double()
    seen = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(2, 3, size, size, generator=generator)
        visible = random_visible(2, (3, 3), 0.6, generator)
        true = run(double, images.double(), visible, packed=False)
        seen.append(errors(run(hierarchy, images, visible, packed=True), true))
        if seen[-1][0] <= 1e-5 and seen[-1][1] <= 1e-4:
            return
    pytest.fail(f"maps and gradients are off by {seen}")
