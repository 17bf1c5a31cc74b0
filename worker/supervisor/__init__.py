"""The process that claims jobs and supervises a trainer; never imports torch."""
