"""The Celery worker: trains queued jobs, each to a certified adapter."""
