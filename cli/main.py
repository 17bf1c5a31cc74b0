"""`olora`: the service, its clients, and training without the service, from the command line.

Commands import what they need when they run, so that `olora --help` is fast.
"""

import os
import sys
import traceback
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from olora_core.errors import OloraError

from . import adapters, compare, comparisons, files, jobs, methods, serve, train

LONGEST_REASON = 300

app = typer.Typer(
    help="Self-hosted fine-tuning with OpenAI's API. Adapters load in PEFT, transformers and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(serve.serve)
app.command()(serve.worker)
app.command()(serve.migrate)
app.command()(train.train)
app.command()(compare.compare)
app.command()(methods.methods)
app.add_typer(files.app, name="files", help="Upload training files.")
app.add_typer(jobs.app, name="jobs", help="Create, list, watch and cancel fine-tuning jobs.")
app.add_typer(comparisons.app, name="comparisons", help="Compare fine-tuning methods in the service.")
app.add_typer(adapters.app, name="adapters", help="Download trained adapters.")


def main() -> None:
    """Runs a command. An error is printed as one sentence, with exit code 1."""
    try:
        app()
    except OloraError as error:
        _end(str(error))
    except Exception as error:
        if _is_debug():
            traceback.print_exc()
        _end(_system_error(error) if isinstance(error, OSError) else _unexpected(error))


def _end(sentence: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {sentence}", style="red"))
    sys.exit(1)


def _system_error(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return _unexpected(error)
    path = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
    return f"Cannot read or write {path}: {error.strerror}. Choose another path."


def _unexpected(error: Exception) -> str:
    reason = " ".join(str(error).split())[:LONGEST_REASON].rstrip(".")
    return (
        f"Unexpected error: {type(error).__name__}{': ' if reason else ''}{reason}. "
        "Run the command with OLORA_LOG_LEVEL=debug for a traceback."
    )


def _is_debug() -> bool:
    from store.settings import get_settings

    try:
        return get_settings().log_level == "debug"
    except OloraError:
        return False


if __name__ == "__main__":
    main()
