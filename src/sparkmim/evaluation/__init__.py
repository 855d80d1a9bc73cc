"""How good frozen features are."""

from sparkmim.evaluation.features import pooled_features
from sparkmim.evaluation.knn import knn_accuracy, knn_predict

__all__ = ["knn_accuracy", "knn_predict", "pooled_features"]
