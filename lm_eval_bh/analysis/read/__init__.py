"""Finds, reads and checks the files of runs."""
