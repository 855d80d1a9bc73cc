"""Training: settings, recipes and schedules; the Lightning modules and callbacks; the four trainings."""
