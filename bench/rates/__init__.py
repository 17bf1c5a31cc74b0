"""Which learning rate suits a method: sweeps, and what can be known before the first step."""
