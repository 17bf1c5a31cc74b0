"""`olora`: the service, its clients, and training without the service, from the command line.

A command loads what it needs when it runs, so that `olora --help` answers at once.
"""

import sys

import typer
from rich.console import Console
from rich.text import Text

from olora_core.errors import OloraError

from . import adapters, files, jobs, serve, train

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
app.add_typer(files.app, name="files", help="Upload training files.")
app.add_typer(jobs.app, name="jobs", help="Ask for fine-tuning jobs, and follow them.")
app.add_typer(adapters.app, name="adapters", help="Fetch what a job has trained.")


def main() -> None:
    """Runs a command; expected trouble ends it with one sentence and exit code 1."""
    from store.errors import StoreError

    try:
        app()
    except (OloraError, StoreError) as error:
        Console(stderr=True, soft_wrap=True).print(Text(f"Error: {error}", style="red"))
        sys.exit(1)


if __name__ == "__main__":
    main()
