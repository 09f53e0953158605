"""Searches the policy that loses least at a mean number of experts, and confirms it."""
