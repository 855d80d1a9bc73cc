"""Training: recipes, schedules, the Lightning modules, the run folder."""

from sparkmim.training.layer_decay import layer_decay_exponents

__all__ = ["layer_decay_exponents"]
