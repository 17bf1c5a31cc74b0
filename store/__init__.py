"""Settings, database rows, the life cycle of a job, stored files and the queue. Never loads torch."""
