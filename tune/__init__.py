"""The search over DCML weights with Ray Tune."""
