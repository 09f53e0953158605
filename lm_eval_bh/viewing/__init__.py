"""Runs a patched model on a text, and passes its decisions to the page."""
