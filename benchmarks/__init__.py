"""Measurements, each one command; results with their commands are in docs/performance.md."""
