"""What the service remembers: settings, rows, a job's life, stored files, the queue. No torch."""
