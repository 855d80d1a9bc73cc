"""Mask R-CNN on COCO from a pretrained ConvNeXt-B, as SparK published it, for MMDetection 3.

It is MMDetection's own recipe for ConvNeXt-T, of which this file changes what `downstream_mmdet` in keyu-tian/SparK
has otherwise. Taken over are 36 epochs, drops after the 27th and 33rd, shorter sides of 480 to 800 with DETR's crops,
and 16 images per step, two on each of 8 GPUs.
"""

# ruff: noqa: C408 (written as MMDetection writes its own)

_base_ = ["mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py"]

model = dict(
    backbone=dict(arch="base", drop_path_rate=0.5, init_cfg=dict(checkpoint="convnext_base.pth")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)

# MMDetection: AmpOptimWrapper, 1e-4, 0.95 over 6 groups.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(lr=2e-4, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.65, num_layers=12),
)

# MMDetection: 1000 steps of warm-up, gamma 0.1.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.2),
]
