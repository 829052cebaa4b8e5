"""A model that runs: assembled from a store, on one machine."""
