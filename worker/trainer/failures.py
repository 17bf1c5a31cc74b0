"""How a training process reports why it fails, and exits."""

import errno
import logging
import os
from typing import NoReturn


def sentence_of(error: Exception) -> str:
    """One sentence for the job's owner; the traceback is in the log."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return (
            "The device ran out of memory; "
            "a smaller micro_batch_size, context_length or rank, or packing = false, needs less."
        )
    if isinstance(error, MemoryError):
        return "The machine ran out of memory."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "No space is left on the worker's disk."
    lines = str(error).strip().splitlines()
    return f"The training process failed with an unexpected {type(error).__name__}" + (
        f": {lines[0][:300]}" if lines else "."
    )


def leave(code: int) -> NoReturn:
    """Exits without waiting for the threads that listen and watch."""
    logging.shutdown()
    os._exit(code)
