"""Networks: encoders, feature hierarchies, SparK, classifiers, detectors and segmenters."""

from sparkmim.models.classifier import PooledClassifier, create_classifier
from sparkmim.models.encoders import create_encoder
from sparkmim.models.hierarchy import Hierarchy
from sparkmim.models.masking import random_visible
from sparkmim.models.spark import SparK, SparKOutput
from sparkmim.models.verify import verify_encoder

__all__ = [
    "Hierarchy",
    "PooledClassifier",
    "SparK",
    "SparKOutput",
    "create_classifier",
    "create_encoder",
    "random_visible",
    "verify_encoder",
]
