"""The processes that train; they never import the store."""
