"""Differential privacy: of local training and of pushes, and the account of what was spent."""
