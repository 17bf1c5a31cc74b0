"""How a command fails: one sentence, and an exit code."""

import os
import sys
from typing import NoReturn

from rich.console import Console
from rich.text import Text

LONGEST_REASON = 300


def end(sentence: str, code: int = 1) -> NoReturn:
    """Prints the sentence and ends the process."""
    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {sentence}", style="red"))
    sys.exit(code)


def system_error(error: OSError) -> str:
    """The sentence for an error of the operating system."""
    if error.filename is None or error.strerror is None:
        return unexpected(error)
    path = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
    return f"Cannot read or write {path}: {error.strerror}. Choose another path."


def unexpected(error: Exception) -> str:
    """The sentence for an error that nothing foresaw."""
    reason = " ".join(str(error).split())[:LONGEST_REASON].rstrip(".")
    return (
        f"Unexpected error: {type(error).__name__}{': ' if reason else ''}{reason}. "
        "Run the command with OLORA_LOG_LEVEL=debug for a traceback."
    )
