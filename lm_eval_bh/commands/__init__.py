"""The subcommands of ``lm-eval-bh``: they read arguments and call who does the work."""
