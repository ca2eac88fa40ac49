"""A model on images: windows, predictions as files, scores and their means."""
