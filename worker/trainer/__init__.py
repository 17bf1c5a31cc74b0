"""The processes that train; they never reach the store."""
