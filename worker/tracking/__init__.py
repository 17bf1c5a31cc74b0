"""Experiment trackers: following a job and telling others its curves; never reaches torch."""
