"""The code of an exported folder, which needs torch and transformers but not this package."""
