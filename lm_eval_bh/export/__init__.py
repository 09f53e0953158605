"""Exports policies to engines without this package, and verifies them there."""
