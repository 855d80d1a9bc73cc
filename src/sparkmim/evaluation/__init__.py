"""Evaluation of frozen features and of trained classifiers, detectors and segmenters."""

from sparkmim.evaluation.coco import CocoScores, coco_results, evaluate_coco
from sparkmim.evaluation.features import pooled_features, stage_features
from sparkmim.evaluation.fewshot import few_shot
from sparkmim.evaluation.knn import knn_accuracy, knn_predict
from sparkmim.evaluation.linear import Probe, fit_logistic, linear_probe
from sparkmim.evaluation.segmentation import SegmentationScores, classes_at, evaluate_segmentation

__all__ = [
    "CocoScores",
    "Probe",
    "SegmentationScores",
    "classes_at",
    "coco_results",
    "evaluate_coco",
    "evaluate_segmentation",
    "few_shot",
    "fit_logistic",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "pooled_features",
    "stage_features",
]
