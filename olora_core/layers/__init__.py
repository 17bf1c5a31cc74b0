"""Adapted linear layers: the adapter's interface, its products, and quantised weights."""
