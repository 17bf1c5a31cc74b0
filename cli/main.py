"""`olora`: the service, its clients, and training without the service, from the command line.

A command loads what it needs when it runs, so that `olora --help` answers at once.
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
    help="Self-hosted fine-tuning: OpenAI's API, your machines, adapters that load everywhere.",
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
app.add_typer(jobs.app, name="jobs", help="Ask for fine-tuning jobs, and follow them.")
app.add_typer(comparisons.app, name="comparisons", help="Have the service compare methods.")
app.add_typer(adapters.app, name="adapters", help="Fetch what a job has trained.")


def main() -> None:
    """Runs a command; trouble ends it with one sentence and exit code 1."""
    try:
        app()
    except OloraError as error:
        _end(str(error))
    except Exception as error:
        if _tells_more():
            traceback.print_exc()
        _end(_of_the_system(error) if isinstance(error, OSError) else _unexpected(error))


def _end(sentence: str) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(Text(f"Error: {sentence}", style="red"))
    sys.exit(1)


def _of_the_system(error: OSError) -> str:
    """The place that the system refused, where it names one."""
    if error.filename is None or error.strerror is None:
        return _unexpected(error)
    place = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
    return f"{place} cannot be read or written: {error.strerror}. Mend this place, or name another one."


def _unexpected(error: Exception) -> str:
    reason = " ".join(str(error).split())[:LONGEST_REASON].rstrip(".")
    return (
        f"This was not expected: {type(error).__name__}{': ' if reason else ''}{reason}. "
        "The same command with OLORA_LOG_LEVEL=debug shows where it happened."
    )


def _tells_more() -> bool:
    from store.settings import get_settings

    try:
        return get_settings().log_level == "debug"
    except OloraError:
        return False


if __name__ == "__main__":
    main()
