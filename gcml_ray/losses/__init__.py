"""Segmentation losses and the divergences of mutual learning."""
