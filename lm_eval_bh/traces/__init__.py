"""Imports the routing that other engines recorded, as runs for tables and patterns."""
