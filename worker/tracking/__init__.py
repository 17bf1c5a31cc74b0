"""A job's curves, in TensorBoard files and experiment trackers; never imports torch."""
