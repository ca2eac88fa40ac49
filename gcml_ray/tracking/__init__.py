"""Tracking in MLflow: runs, comparisons, searches."""
