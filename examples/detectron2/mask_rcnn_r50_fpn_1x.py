"""Mask R-CNN on COCO from a pretrained ResNet-50, as SparK published it, for Detectron2's `lazyconfig_train_net.py`.

It sets what `downstream_d2` in keyu-tian/SparK sets; the rest is Detectron2's default in both.
"""

import re

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler


def lr_factor(name: str) -> float:
    """Share of the learning rate that a parameter learns at: 0.6 to the number of its group; the heads have 0."""
    match = re.match(r"backbone\.bottom_up\.(?:stem|res(\d)\.(\d+))\.", name)
    if match is None:
        return 1.0  # the pyramid, the heads
    stage, block = (int(number or 0) for number in match.groups())  # the stem is stage 0
    return 0.6 ** {0: 6, 2: 5, 3: 4, 4: 3 if block < 3 else 2, 5: 1}[stage]


model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.input_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]  # 255 times those of the pretraining run
model.pixel_std = [58.395, 57.12, 57.375]
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stages.stride_in_1x1 = False
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = model.backbone.norm = "SyncBN"
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = "SyncBN"

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.total_batch_size = 16  # over all GPUs
dataloader.train.mapper.image_format = "RGB"  # evaluation follows
dataloader.train.mapper.augmentations[0].short_edge_length = list(range(480, 897, 32))
dataloader.train.mapper.augmentations[0].max_size = 1333

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "r50.pkl"
train.max_iter = 90_000

optimizer = LazyCall(torch.optim.AdamW)(
    params=LazyCall(get_default_optimizer_params)(
        base_lr="${..lr}",
        weight_decay_norm=0.0,
        lr_factor_func=lr_factor,
    ),
    lr=2.5e-4,
    weight_decay=1e-4,
)
lr_multiplier = LazyCall(WarmupParamScheduler)(
    scheduler=LazyCall(MultiStepParamScheduler)(
        values=[1.0, 0.25, 0.25**2],
        milestones=[60_000, 80_000],
        num_updates=90_000,
    ),
    warmup_factor=0.01,
    warmup_length=1000 / 90_000,
)
