"""What other engines recorded of their routing, as runs that tables and patterns can read."""
