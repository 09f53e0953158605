"""Where lm-eval meets routing: the hf-bh model, its logs, the plugin hooks."""
