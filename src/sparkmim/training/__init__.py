"""Training: recipes, schedules, the Lightning module, the run folder."""
