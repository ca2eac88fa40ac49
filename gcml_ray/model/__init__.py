"""A network as one flat vector: its optimiser, local and mutual steps, precision, where its weights start."""
