"""What an installation, a machine and a model are like, and what to do about it."""
