"""Policies of a model: previews in one pass, calibration, searches and leagues."""
