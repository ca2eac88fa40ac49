"""The algorithm: losses, networks, gossip graphs, learner, methods, data, metrics. Knows nothing of Ray."""
