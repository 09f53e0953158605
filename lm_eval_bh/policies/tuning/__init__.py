"""Searches for the policy with the smallest loss at a cost, and confirms it."""
