"""Images for pretraining: where they are, how they are read, and what becomes of them."""

from sparkmim.data.arrays import ARRAY_SUFFIXES, array_transform, read_array, to_array
from sparkmim.data.augmentation import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Transform,
    classify_transform,
    eval_transform,
    normalisation,
    pretrain_transform,
)
from sparkmim.data.coco import (
    CocoFiles,
    CocoImages,
    check_coco,
    collate_detection,
    find_coco,
    open_coco,
)
from sparkmim.data.dataset import AugmentedDataset, LabelledDataset, PretrainDataset, TargetDataset, collate, to_image
from sparkmim.data.decoding import UnreadableImage, decode, from_pil
from sparkmim.data.detection import detection_resize, detection_transform
from sparkmim.data.discovery import find_images
from sparkmim.data.label_maps import (
    SegmentationFiles,
    SegmentationImages,
    check_segmentation,
    find_segmentation,
    open_segmentation,
    read_class_names,
)
from sparkmim.data.labelled import Labelled, open_labelled
from sparkmim.data.samplers import EpochBatchSampler, counted_seed
from sparkmim.data.segmentation import segmentation_resize, segmentation_transform
from sparkmim.data.statistics import ChannelStatistics, channel_statistics
from sparkmim.data.unreadable import SkipLog

__all__ = [
    "ARRAY_SUFFIXES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AugmentedDataset",
    "ChannelStatistics",
    "CocoFiles",
    "CocoImages",
    "EpochBatchSampler",
    "Labelled",
    "LabelledDataset",
    "PretrainDataset",
    "SegmentationFiles",
    "SegmentationImages",
    "SkipLog",
    "TargetDataset",
    "Transform",
    "UnreadableImage",
    "array_transform",
    "channel_statistics",
    "check_coco",
    "check_segmentation",
    "classify_transform",
    "collate",
    "collate_detection",
    "counted_seed",
    "decode",
    "detection_resize",
    "detection_transform",
    "eval_transform",
    "find_coco",
    "find_images",
    "find_segmentation",
    "from_pil",
    "normalisation",
    "open_coco",
    "open_labelled",
    "open_segmentation",
    "pretrain_transform",
    "read_array",
    "read_class_names",
    "segmentation_resize",
    "segmentation_transform",
    "to_array",
    "to_image",
]
