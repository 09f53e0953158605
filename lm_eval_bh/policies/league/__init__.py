"""Every method on equal terms: the same means, the same unseen text, one file that can be checked."""
