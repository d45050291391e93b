"""Measurements of methods: comparisons at equal tuning, benchmarks of a step, profiles on test functions."""
