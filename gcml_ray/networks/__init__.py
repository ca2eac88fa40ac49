"""Segmentation networks by name."""
