"""Base models: loading them safely, finding the layers to adapt, and running them forward."""
