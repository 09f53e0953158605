"""What a selection rule would do with a model: grids in one pass, calibration of a named model."""
