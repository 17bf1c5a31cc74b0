"""Celery: turns a queued job into a certified adapter."""
