"""Data: found, read, augmented, and put into batches."""

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
from sparkmim.data.coco import CocoFiles, CocoImages, check_coco, find_coco, open_coco
from sparkmim.data.dataset import (
    AugmentedDataset,
    LabelledDataset,
    PretrainDataset,
    TargetDataset,
    collate,
    collate_detection,
)
from sparkmim.data.decoding import UnreadableImage, decode, from_pil, to_image
from sparkmim.data.detection_transforms import detection_resize, detection_transform
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
from sparkmim.data.segmentation_transforms import segmentation_resize, segmentation_transform
from sparkmim.data.skip_log import SkipLog
from sparkmim.data.source import Source, open_source
from sparkmim.data.statistics import ChannelStatistics, channel_statistics

__all__ = [
    "ARRAY_SUFFIXES",
    "AugmentedDataset",
    "ChannelStatistics",
    "CocoFiles",
    "CocoImages",
    "EpochBatchSampler",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Labelled",
    "LabelledDataset",
    "PretrainDataset",
    "SegmentationFiles",
    "SegmentationImages",
    "SkipLog",
    "Source",
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
    "open_source",
    "pretrain_transform",
    "read_array",
    "read_class_names",
    "segmentation_resize",
    "segmentation_transform",
    "to_array",
    "to_image",
]
