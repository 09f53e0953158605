"""How lm-eval gets to know the model and the tasks."""
