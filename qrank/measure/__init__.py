"""Measurements and checks of targets and backends, in child processes."""
