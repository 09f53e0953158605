"""From experiments to one tidy table: metrics, rows, what only several runs tell."""
