"""The limits of servers that load adapters."""

SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `--max-lora-rank` takes."""
MAX_EXPORT_RANK = 512
"""The highest rank that servers accept, vLLM's largest `--max-lora-rank`."""
WHERE_TOO_WIDE = (
    "truncate the export with adapter.export_rank, or export the whole model with adapter.export = 'merged'"
)
"""The remedy for an export of too high a rank, whatever the method."""


def server_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM with which an adapter of this rank loads."""
    return next(allowed for allowed in SERVER_RANKS if allowed >= rank)
