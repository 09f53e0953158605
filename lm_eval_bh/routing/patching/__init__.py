"""Patches models: hooks in routers, experts that skip unused slots, counters."""
