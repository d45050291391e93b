"""Measurements behind scripts/bench.py."""
