"""What a run leaves: an adapter or a whole model, its manifest, its model card and its certificate."""
