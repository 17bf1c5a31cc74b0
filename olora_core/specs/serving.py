"""What servers can load."""

SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes."""
MAX_EXPORT_RANK = 512
"""The widest pair that servers accept (vLLM's largest `--max-lora-rank`)."""
WHERE_TOO_WIDE = (
    "let adapter.export_rank truncate the export, or take the whole model with adapter.export = 'merged'"
)
"""What helps whatever the method."""


def server_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM that takes this adapter."""
    return next(allowed for allowed in SERVER_RANKS if allowed >= rank)
