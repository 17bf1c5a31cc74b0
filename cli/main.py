"""`olora`: the service, its clients, and training without the service, from the command line.

Commands import what they need when they run, so that `olora --help` is fast.
"""

import traceback

import typer

from olora_core.errors import OloraError

from . import adapters, compare, comparisons, files, jobs, methods, models, serve, train
from .failures import end, system_error, unexpected

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
app.add_typer(models.app, name="models", help="Add and list base models. Needs no service.")
app.add_typer(files.app, name="files", help="Upload training files.")
app.add_typer(jobs.app, name="jobs", help="Create, list, watch and cancel fine-tuning jobs.")
app.add_typer(comparisons.app, name="comparisons", help="Compare fine-tuning methods in the service.")
app.add_typer(adapters.app, name="adapters", help="Download trained adapters.")


def main() -> None:
    """Runs a command. An error is printed as one sentence, with exit code 1."""
    try:
        app()
    except OloraError as error:
        end(str(error))
    except Exception as error:
        if _is_debug():
            traceback.print_exc()
        end(system_error(error) if isinstance(error, OSError) else unexpected(error))


def _is_debug() -> bool:
    from store.settings import get_settings

    try:
        return get_settings().log_level == "debug"
    except OloraError:
        return False


if __name__ == "__main__":
    main()
