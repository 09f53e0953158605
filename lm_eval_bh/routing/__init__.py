"""Selection rules, null models, and the hooks that put them into a model. Torch only."""
