"""Resumable sweeps: a grid of routing configurations and tasks, with one loaded model."""
