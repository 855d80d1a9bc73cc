"""torchvision's detectors on any encoder: losses, gradients, what they find, and that the encoder stays itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_networks import PlainCNN
from timm.layers import DropPath
from torch import Tensor
from torchvision.ops.poolers import LevelMapper

from sparkmim.models import Hierarchy, create_encoder
from sparkmim.models.detector import create_detector
from sparkmim.models.pyramid import RegionBatchNorm
from sparkmim.training.layer_decay import detector_layer_decay_exponents

SMALL_CNN = f"{Path(__file__).parents[2] / 'examples' / 'small_cnn.py'}:small_cnn"
FEW: dict[str, Any] = {
    "rpn_pre_nms_top_n_train": 100, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_train": 50,
    "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 32, "box_score_thresh": 0.0,
    "box_detections_per_img": 5, "short_side": 96, "long_side": 128,
}  # fmt: skip


def batch(channels: int = 3) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different size, the first with two objects, the second with none."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(channels, *size, generator=generator) for size in ((96, 80), (70, 110))]
    boxes = torch.tensor([[10.0, 10, 50, 60], [40, 20, 75, 90]])
    masks = torch.zeros(2, 96, 80, dtype=torch.uint8)
    masks[0, 10:60, 10:50] = 1
    masks[1, 20:90, 40:75] = 1
    full = {"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}
    empty = {
        "boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 70, 110, dtype=torch.uint8),
    }  # fmt: skip
    return images, [full, empty]


@pytest.mark.parametrize(
    ("name", "masks", "norm", "box_head", "strides"),
    [
        ("resnet18", True, "batch", "4conv1fc", (4, 8, 16, 32, 64)),
        ("convnext_atto", True, "none", "2fc", (4, 8, 16, 32, 64)),
        ("efficientnet_b0", False, "none", "2fc", (4, 8, 16, 32, 64)),
        (SMALL_CNN, True, "batch", "2fc", (4, 8, 16)),
    ],
)
def test_it_trains_and_finds(name: str, masks: bool, norm: Any, box_head: Any, strides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model: Any = create_detector(create_encoder(name), 3, masks, norm=norm, box_head=box_head, **FEW)
    assert model.backbone.strides == strides
    assert model.rpn.anchor_generator.sizes == tuple((8 * stride,) for stride in strides)
    images, targets = batch()

    losses = model.train()(images, targets)
    expected = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert set(losses) == expected | ({"loss_mask"} if masks else set())
    sum(losses.values()).backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    assert not without
    frozen = {name for name, _ in model.named_parameters()} - set(trained)
    assert frozen == {f"backbone.encoder.{name}" for name in model.backbone.hierarchy.unreached}
    assert set(detector_layer_decay_exponents(model)) == {name for name, _ in model.named_parameters()}

    with torch.no_grad():
        found = model.eval()(images)
    for image, objects in zip(images, found, strict=True):
        count = len(objects["boxes"])
        assert 0 < count <= 5
        assert objects["boxes"].shape == (count, 4)
        assert objects["scores"].shape == objects["labels"].shape == (count,)
        assert set(objects["labels"].tolist()) <= {1, 2, 3}
        assert ("masks" in objects) == masks
        if masks:
            assert objects["masks"].shape == (count, 1, *image.shape[1:])


def test_the_encoder_is_the_same_module_once() -> None:
    """Its names, its values, its feature maps; a copy has an encoder of its own."""
    encoder = create_encoder("resnet18").eval()
    names = list(encoder.state_dict())
    model: Any = create_detector(encoder, 2, **FEW).eval()
    assert model.backbone.encoder is encoder
    held = [name for name in model.state_dict() if name.startswith("backbone.encoder.")]
    assert held == [f"backbone.encoder.{name}" for name in names]
    images = torch.rand(2, 3, 64, 128)
    maps: list[Tensor] = []
    model.backbone.pyramid.register_forward_pre_hook(lambda _, inputs: maps.extend(inputs[0].values()))
    with torch.no_grad():
        model.backbone(images)
        torch.testing.assert_close(maps, Hierarchy(encoder)(images), rtol=0, atol=0)
    other = copy.deepcopy(model)
    assert other.backbone.hierarchy.encoder is other.backbone.encoder is not encoder


def test_no_object_leaves_statistics_as_they_are() -> None:
    norm = RegionBatchNorm(2)
    norm(torch.rand(3, 2, 4, 4))
    before = copy.deepcopy(norm.state_dict())
    out = norm(torch.zeros(0, 2, 4, 4))
    assert out.shape == (0, 2, 4, 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())
    out.sum().backward()
    assert norm.weight.grad is not None


def test_a_batch_without_objects_has_finite_losses() -> None:
    model = create_detector(create_encoder("resnet18"), 2, norm="batch", **FEW)
    images, targets = batch()
    losses = model(images[1:], targets[1:])
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_mask"] == 0


def test_boxes_go_to_the_levels_of_torchvision() -> None:
    model: Any = create_detector(create_encoder("resnet18"), 2, **FEW)
    corner = 300 * torch.rand(2000, 2)
    boxes = torch.cat([corner, corner + 1000 * torch.rand(2000, 2)], 1)
    expected = LevelMapper(2, 5, canonical_scale=224, canonical_level=4)([boxes])
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert torch.equal(pool.map_levels([boxes]), expected)
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_images_are_resized_in_evaluation_only() -> None:
    model: Any = create_detector(create_encoder("resnet18"), 2, **FEW)
    images, targets = batch()
    seen = [model.train(training).transform(images, targets)[0] for training in (True, False)]
    assert [image.image_sizes for image in seen] == [[(96, 80), (70, 110)], [(115, 96), (81, 128)]]
    assert [image.tensors.shape[-2:] for image in seen] == [(128, 128), (128, 128)]  # multiples of 64


def test_channels_and_their_statistics() -> None:
    """Grey images, and a classifier that no map depends on."""
    encoder = PlainCNN(1)
    model: Any = create_detector(encoder, 3, masks=False, channels=1, mean=[0.4], std=[0.2], **FEW)
    assert not encoder.head.weight.requires_grad
    images, targets = batch(channels=1)
    prepared = model.transform([torch.full((1, 64, 64), 0.6)])[0].tensors
    torch.testing.assert_close(prepared, torch.ones(1, 1, 64, 64))
    assert sum(model(images, targets).values()).isfinite()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"channels": 4}, "channels is 4, which has no default mean"),
        ({"mean": [0.5]}, "mean has length 1, but channels is 3"),
        ({"box_head": "3fc"}, "no box head '3fc'; choose 4conv1fc or 2fc"),
        ({"norm": "group"}, "no norm 'group'"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_detector(create_encoder("resnet18"), **{"classes": 2, **changes})


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", SMALL_CNN])
@pytest.mark.parametrize("stages", [1, 2])
def test_frozen_stages_stay_as_they_are(name: str, stages: int) -> None:
    """Up to that map, nothing changes in a step, statistics included; all else that a map depends on does."""
    torch.manual_seed(0)
    model: Any = create_detector(create_encoder(name), 3, masks=False, **FEW)
    model.backbone.freeze(stages)
    encoder = model.backbone.encoder
    up_to = Hierarchy(create_encoder(name), stages=stages)
    unreached = set(Hierarchy(create_encoder(name)).unreached)
    frozen = {parameter for parameter, _ in encoder.named_parameters() if parameter not in up_to.unreached}
    assert frozen
    assert {parameter for parameter, tensor in encoder.named_parameters() if not tensor.requires_grad} == (
        frozen | unreached
    )
    before, images = copy.deepcopy(encoder.state_dict()), torch.rand(2, 3, 64, 64)
    expected = Hierarchy(copy.deepcopy(encoder).eval())(images)[stages - 1]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    losses = model.train()(*batch())
    sum(losses.values()).backward()
    optimizer.step()
    modules = {parameter.rpartition(".")[0] for parameter in frozen}
    for key, tensor in encoder.state_dict().items():
        if key.rpartition(".")[0] in modules:
            assert torch.equal(tensor, before[key]), key
    learning = {name for name, tensor in encoder.named_parameters() if tensor.grad is not None}
    assert learning == {name for name, _ in encoder.named_parameters()} - frozen - unreached
    assert torch.equal(Hierarchy(encoder.eval())(images)[stages - 1], expected)


def test_stochastic_depth_is_off_in_frozen_stages() -> None:
    model: Any = create_detector(create_encoder("convnext_atto", drop_path=0.5), 3, masks=False, **FEW)
    model.backbone.freeze(2)
    encoder = model.train().backbone.encoder
    dropping = [name for name, part in encoder.named_modules() if isinstance(part, DropPath)]
    on = [name for name in dropping if encoder.get_submodule(name).training]
    assert any(name.startswith("stages.1.") for name in dropping)
    assert on == [name for name in dropping if name.startswith(("stages.2.", "stages.3."))]


def test_stages_that_are_not_there() -> None:
    model: Any = create_detector(create_encoder("resnet18"), 3, masks=False, **FEW)
    with pytest.raises(ValueError, match="frozen_stages is 5; ResNet has 4 stages, so it takes 0"):
        model.backbone.freeze(5)
