"""What an exported folder holds as code: plain torch and transformers, nothing of this package."""
