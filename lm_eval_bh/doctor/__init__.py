"""Examines an installation, a machine and a model, and suggests remedies."""
