"""Makes the model and the tasks known to lm-eval."""
