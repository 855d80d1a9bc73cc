"""Runs: folder, history, environment and report."""
