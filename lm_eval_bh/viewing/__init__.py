"""Shows what routing decides on a text: runs a patched model, and hands the page its decisions."""
