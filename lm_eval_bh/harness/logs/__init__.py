"""Assigns rows of forward passes to requests, and logs their routing."""
