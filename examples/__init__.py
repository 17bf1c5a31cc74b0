"""The shipped base model and training files, with the scripts that made them."""
