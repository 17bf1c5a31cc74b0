"""The statuses of a job, in the order in which it can reach them."""

WAITING = ("validating_files", "queued")
UNFINISHED = (*WAITING, "running", "paused")
ENDED = ("succeeded", "failed", "cancelled")
STATUSES = (*UNFINISHED, *ENDED)
