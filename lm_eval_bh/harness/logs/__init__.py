"""Whose a row of a forward pass is, and what is kept of its routing."""
