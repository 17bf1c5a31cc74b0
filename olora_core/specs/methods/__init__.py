"""The options of each method, one file a method."""
