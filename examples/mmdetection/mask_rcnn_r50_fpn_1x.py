"""Mask R-CNN on COCO from a pretrained ResNet-50, for MMDetection 3: what SparK published for Detectron2.

The base is MMDetection's own counterpart of Detectron2's 1x: 90,000 steps of 16 images, two on each of 8 GPUs.
"""

# ruff: noqa: C408 (written as MMDetection writes its own)

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::common/ms-poly-90k_coco-instance.py"]

norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        init_cfg=dict(checkpoint="r50.pth", prefix="backbone."),
    ),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile", imdecode_backend="pillow"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True, poly2mask=False),
    dict(
        type="RandomChoiceResize",
        scales=[(1333, side) for side in range(480, 897, 32)],
        keep_ratio=True,
        backend="pillow",
    ),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

# MMDetection's constructor with layer decay knows ConvNeXts only, so each group's rate stands here. The backbone's
# norms have weight decay too, since what has a key of its own escapes `norm_decay_mult`.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=2.5e-4, weight_decay=1e-4),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            "backbone.conv1": dict(lr_mult=0.6**6),
            "backbone.bn1": dict(lr_mult=0.6**6),
            "backbone.layer1": dict(lr_mult=0.6**5),
            "backbone.layer2": dict(lr_mult=0.6**4),
            "backbone.layer3.0": dict(lr_mult=0.6**3),
            "backbone.layer3.1": dict(lr_mult=0.6**3),
            "backbone.layer3.2": dict(lr_mult=0.6**3),
            "backbone.layer3": dict(lr_mult=0.6**2),  # blocks 3 to 5
            "backbone.layer4": dict(lr_mult=0.6),
        },
    ),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=90_000, milestones=[60_000, 80_000], gamma=0.25),
]
