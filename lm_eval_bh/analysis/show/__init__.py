"""What people look at: figures, the report, the overview in the terminal."""
