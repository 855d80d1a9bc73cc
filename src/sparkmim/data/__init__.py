"""Images for pretraining: where they are, how they are read, and what becomes of them."""

from sparkmim.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Transform,
    eval_transform,
    normalisation,
    pretrain_transform,
)
from sparkmim.data.dataset import EpochBatchSampler, PretrainDataset, SkipLog, collate, counted_seed, to_image
from sparkmim.data.decoding import UnreadableImage, decode, from_pil
from sparkmim.data.sources import find_images

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "EpochBatchSampler",
    "PretrainDataset",
    "SkipLog",
    "Transform",
    "UnreadableImage",
    "collate",
    "counted_seed",
    "decode",
    "eval_transform",
    "find_images",
    "from_pil",
    "normalisation",
    "pretrain_transform",
    "to_image",
]
