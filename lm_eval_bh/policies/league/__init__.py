"""Every method on equal terms: the same means, the same unseen text, one file to check."""
