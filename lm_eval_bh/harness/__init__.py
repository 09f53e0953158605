"""Connects lm-eval with routing: the hf-bh model, its logs, the plugin hooks."""
