"""Compares all methods at the same means on the same unseen text, in one checkable file."""
