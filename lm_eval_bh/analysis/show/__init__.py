"""Output for people: figures, the report, the overview in the terminal."""
