"""Adapted linear layers: the adapter interface, fused products, and quantised weights."""
