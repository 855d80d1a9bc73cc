"""Runs: their folder, environment and report."""
