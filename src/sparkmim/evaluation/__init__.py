"""How good frozen features and detections are."""

from sparkmim.evaluation.coco import CocoScores, coco_results, evaluate_coco
from sparkmim.evaluation.features import pooled_features, stage_features
from sparkmim.evaluation.fewshot import few_shot
from sparkmim.evaluation.knn import knn_accuracy, knn_predict
from sparkmim.evaluation.linear import Probe, fit_logistic, linear_probe

__all__ = [
    "CocoScores",
    "Probe",
    "coco_results",
    "evaluate_coco",
    "few_shot",
    "fit_logistic",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "pooled_features",
    "stage_features",
]
