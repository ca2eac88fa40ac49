"""Plots of runs, comparisons and searches, made from their folders alone."""
