"""Bounds of the proof of ranking for tests, set before other modules take them over."""

from qrank.bundle import agreement

# Random weights hardly tell passages apart, so that quantizing them changes their order more.
agreement.LEAST = 0.9

from qrank.converters import ranking  # noqa: E402 (only after the above)

# The original ranks as long as its probes take, which is a few queries.
ranking.SECONDS = 0.0
