"""One training run: its data, its steps, its evaluations and its checkpoints."""
