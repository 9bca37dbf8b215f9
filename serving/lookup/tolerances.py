"""How long a request waits for another one, and how far a caller's clock may be ahead."""

from __future__ import annotations

from datetime import timedelta

PATIENCE = 2.0
"""Seconds that a request waits for another one, of whatever worker; one that was stopped never ends."""
MARGIN = timedelta(minutes=5)
"""What is said to be later has not happened yet."""
