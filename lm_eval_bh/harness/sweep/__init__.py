"""Sweeps: a grid of routing configurations times tasks, with one loaded model, to be resumed."""
