"""From experiments to one tidy table: metrics, rows, columns that need several runs."""
