"""The speed phase: every configuration on the same tokens, in one process, in shuffled rounds."""
