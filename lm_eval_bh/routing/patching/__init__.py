"""Model surgery: hooks in the routers, experts without work for unused slots, counters."""
