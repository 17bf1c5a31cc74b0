"""Training data: from the rows of a file to tokenised examples and micro-batches."""
