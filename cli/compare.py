"""`olora compare`: several methods on the same data, each at its best learning rate, and which to take."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from olora_core.errors import SpecError
from olora_core.specs import ComparisonSpec, read_comparison

from .local import (
    STOPPED,
    base_folder,
    check_data,
    console,
    existing_file,
    make_output,
    newest_checkpoint,
    stop_signals,
)
from .options import (
    VALIDATION_HELP,
    Budget,
    Epochs,
    FirstSeed,
    Hyperparameters,
    LearningRates,
    Methods,
    Seeds,
    TrainingType,
    read_budget,
    read_hyperparameters,
    read_methods,
    read_rates,
)
from .progress import ComparisonBars

REQUEST = "request.json"
"""In the output folder: what is compared, so that a later start goes on with nothing else."""
PAGE, REPORT = "comparison.html", "comparison.json"
TOKENS = "tokens"


def compare(
    training_file: Annotated[Path, typer.Argument(metavar="TRAIN.jsonl", help="The rows to train on.")],
    validation_file: Annotated[Path, typer.Option("--validation", help=VALIDATION_HELP)],
    base: Annotated[str, typer.Option(help="The base model: an id, or a folder.")] = "olora-tiny",
    methods: Methods = "all",
    learning_rates: LearningRates = "auto",
    seeds: Seeds = 3,
    seed: FirstSeed = 0,
    budget: Budget = "auto",
    training: TrainingType = "supervised",
    epochs: Epochs = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps of a full run, at most.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step; default: auto.")] = None,
    options: Hyperparameters = None,
    search_share: Annotated[
        float, typer.Option(help="Of the training rows, held out to choose learning rates by.")
    ] = 0.1,
    output: Annotated[Path, typer.Option(help="Where the page, the numbers and checkpoints go.")] = Path(
        "comparison"
    ),
    device: Annotated[
        str, typer.Option(help="Where to train: cpu, cuda, cuda:1; auto takes a GPU.")
    ] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew where the output holds a comparison.")
    ] = False,
) -> None:
    """Compare methods on your data, and say which to take.

    Same rows, same order, as many trained numbers; the learning rate is searched for every method. The
    result is a page (comparison.html) and its numbers (comparison.json). A comparison that was interrupted
    (Ctrl-C saves a checkpoint) goes on when the same command is given again.
    """
    spec = read_comparison(
        model=base,
        methods=read_methods(methods),
        type=training,
        budget=read_budget(budget),
        hyperparameters=read_hyperparameters(
            options, n_epochs=epochs, max_steps=max_steps, batch_size=batch_size
        ),
        learning_rates=read_rates(learning_rates),
        seeds=seeds,
        seed=seed,
        search_share=search_share,
    )
    existing_file(training_file, "training file")
    existing_file(validation_file, "validation")
    if fresh:
        _clear(output)
    elif (output / REPORT).exists():
        raise SpecError(
            f"{output} holds a comparison that is finished; name another output, or say --fresh.",
            param="output",
        )
    _check_request(output, spec)
    check_data(training_file, validation_file, spec.type)
    folder = base_folder(base, Path.cwd())
    make_output(output)
    (output / REQUEST).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
    report = _compare(spec, folder, training_file, validation_file, output, device)
    if report is None:
        console.print("Stopped; the same command goes on from here.")
        raise typer.Exit(STOPPED)
    show_report(report)
    typer.echo(str(output / PAGE))


# --- the output folder -----------------------------------------------------------------------------------


def _check_request(output: Path, spec: ComparisonSpec) -> None:
    """Raises SpecError, by name, when the folder's comparison was asked for otherwise."""
    if not (output / REQUEST).exists():
        return
    try:
        before = ComparisonSpec.model_validate_json((output / REQUEST).read_text(encoding="utf-8"))
    except (ValidationError, ValueError):
        raise SpecError(
            f"{output / REQUEST} does not say what was compared; name another output, or say --fresh.",
            param="output",
        ) from None
    fields = ComparisonSpec.model_fields
    changed = [name for name in fields if getattr(before, name) != getattr(spec, name)]
    if changed:
        raise SpecError(
            f"{output} holds an unfinished comparison with other {' and '.join(changed)}; give the same, "
            "name another output, or say --fresh to begin anew.",
            param="output",
        )


def _clear(output: Path) -> None:
    """Removes what an earlier comparison left in `output`, and nothing else."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    for name in (REQUEST, PAGE, REPORT):
        (output / name).unlink(missing_ok=True)


# --- the comparison --------------------------------------------------------------------------------------


def _compare(
    spec: ComparisonSpec, folder: Path, training: Path, validation: Path, output: Path, device: str
) -> Mapping[str, Any] | None:
    """Drives the core. None when Ctrl-C or SIGTERM stopped it, after a checkpoint."""
    with ComparisonBars(console) as bars, stop_signals() as stopping, ExitStack() as stack:
        bars.phase("loading torch")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for the service's trainer
        import torch

        from olora_core.bases.loading import load_base
        from olora_core.bases.precision import compute_dtype
        from olora_core.comparison.compare import compare as run_comparison
        from olora_core.data.token_cache import trim
        from olora_core.progress import Compared, Saved, drive

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        bars.phase("loading the base model")
        base = load_base(
            folder,
            name=spec.model,
            device=device,
            dtype=compute_dtype(spec.training, folder, device),
            quantization=spec.hyperparameters.quantization,
        )
        resume = newest_checkpoint(output)
        if resume is not None:
            bars.print(f"Going on from {resume.name}.")
        trim([output / TOKENS])
        progress = run_comparison(
            *(spec, base, training, validation, output), resume=resume, cache=output / TOKENS
        )
        updates = stack.enter_context(closing(drive(progress, lambda: "save" if stopping else None)))
        report: Mapping[str, Any] | None = None
        for update in updates:
            bars.show_update(update)
            match update:
                case Saved() if stopping:
                    return None
                case Compared():
                    report = update.report
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        return report


# --- what came of it -------------------------------------------------------------------------------------


def show_report(report: Mapping[str, Any]) -> None:
    """The table of the page, shorter, and the sentence."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    for name in (
        "final loss",
        "below LoRA's",
        "learning rate",
        "rank",
        "steps to LoRA's",
        "time",
        "exported rank",
    ):
        table.add_column(name, justify="right")
    ranked = sorted(report["methods"], key=lambda m: m["final"]["mean"] if m["final"] else float("inf"))
    for method in ranked:
        style = "green" if method["label"] == report["verdict"]["take"] else ""
        is_yardstick = method["label"] == report["yardstick"]
        table.add_row(*map(Text, _cells(method, is_yardstick)), style=style)
    console.print(table)
    for method in ranked:
        if method["problem"]:
            _say(f"{method['label']} has no result: {method['problem']}", "yellow")
    _say(report["verdict"]["sentence"], "bold")


def _cells(method: Mapping[str, Any], is_yardstick: bool) -> Sequence[str]:
    final, steps = method["final"], method["steps_to_yardstick"]
    if final is None:
        return [method["label"], "none"]
    spread = "" if final["deviation"] is None else f" ± {final['deviation']:.4f}"
    below = final["below_yardstick"]
    return [
        method["label"],
        f"{final['mean']:.4f}{spread}",
        "" if below is None or is_yardstick else f"{below['mean']:+.4f}",
        f"{method['learning_rate']:g}",
        str(method["rank"]),
        "never" if steps is None else f"{steps:.0f}",
        f"{method['seconds']:.1f} s",
        "merged only" if method["exported_rank"] is None else str(method["exported_rank"]),
    ]


def _say(message: str, style: str) -> None:
    console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)
