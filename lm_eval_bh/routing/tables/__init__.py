"""Null models and other calibrated tables: how they are fitted, stored and found."""
