"""Reads what experiments left behind and says what it means; needs no torch."""
