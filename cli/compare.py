"""`olora compare`: several methods on the same data, each at its best learning rate."""

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
from olora_core.specs import ComparisonSpec, check_judging, read_comparison

from .local import (
    STOPPED,
    base_folder,
    check_data,
    console,
    existing_file,
    make_output,
    newest_checkpoint,
    print_lines,
    stop_signals,
)
from .options import (
    VALIDATION_HELP,
    Budget,
    Columns,
    Epochs,
    FirstSeed,
    GroupBy,
    Hyperparameters,
    LearningRates,
    Methods,
    Seeds,
    TrainingType,
    ValidationShare,
    read_budget,
    read_columns,
    read_hyperparameters,
    read_methods,
    read_rates,
)
from .progress import ComparisonBars

REQUEST = "request.json"
"""In the output folder: the comparison's spec, which a resumed comparison must match."""
PAGE, REPORT = "comparison.html", "comparison.json"
TOKENS = "tokens"


def compare(
    training_file: Annotated[Path, typer.Argument(metavar="TRAIN.jsonl", help="Training file.")],
    validation_file: Annotated[Path | None, typer.Option("--validation", help=VALIDATION_HELP)] = None,
    validation_share: ValidationShare = None,
    group_by: GroupBy = None,
    base: Annotated[str, typer.Option(help="Base model: an id or a folder.")] = "olora-tiny",
    methods: Methods = "all",
    learning_rates: LearningRates = "auto",
    seeds: Seeds = 3,
    seed: FirstSeed = 0,
    budget: Budget = "auto",
    training: TrainingType = "supervised",
    epochs: Epochs = None,
    max_steps: Annotated[int | None, typer.Option(help="Maximum optimizer steps per full run.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples per optimizer step (default: auto).")
    ] = None,
    options: Hyperparameters = None,
    search_share: Annotated[
        float, typer.Option(help="Share of the training data held out for choosing learning rates.")
    ] = 0.1,
    columns: Columns = None,
    output: Annotated[Path, typer.Option(help="Folder for the report and checkpoints.")] = Path("comparison"),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N (auto: a GPU if there is one).")] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard a comparison in the output folder.")
    ] = False,
) -> None:
    """Compare methods on your data and recommend one.

    All methods train on the same rows in the same order, with about the same number of trainable parameters;
    the learning rate is tuned for each. Writes comparison.html and comparison.json. Ctrl-C saves a
    checkpoint; the same command resumes from it.
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
        validation_share=validation_share,
        group_by=group_by,
        columns=read_columns(columns),
    )
    check_judging(spec, given=validation_file is not None)
    existing_file(training_file, "training file")
    if validation_file is not None:
        existing_file(validation_file, "validation")
    if fresh:
        _clear(output)
    elif (output / REPORT).exists():
        raise SpecError(
            f"{output} holds a finished comparison; choose another --output or add --fresh.",
            param="output",
        )
    _check_request(output, spec)
    read = check_data(
        *(training_file, validation_file, spec.type, spec.columns),
        literal=spec.hyperparameters.takes_control_tokens,
    )
    folder = base_folder(base, Path.cwd())
    make_output(output)
    print_lines(read)
    (output / REQUEST).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
    report = _compare(spec, folder, training_file, validation_file, output, device)
    if report is None:
        console.print("Stopped. Run the same command to resume.")
        raise typer.Exit(STOPPED)
    show_report(report)
    typer.echo(str(output / PAGE))


# --- the output folder -----------------------------------------------------------------------------------


def _check_request(output: Path, spec: ComparisonSpec) -> None:
    """Raises SpecError if the unfinished comparison in `output` has another spec, naming what differs."""
    if not (output / REQUEST).exists():
        return
    try:
        before = ComparisonSpec.model_validate_json((output / REQUEST).read_text(encoding="utf-8"))
    except (ValidationError, ValueError):
        raise SpecError(
            f"{output / REQUEST} is damaged; choose another --output or add --fresh.",
            param="output",
        ) from None
    fields = ComparisonSpec.model_fields
    changed = [name for name in fields if getattr(before, name) != getattr(spec, name)]
    if changed:
        raise SpecError(
            f"{output} holds an unfinished comparison with different {' and '.join(changed)}; give the same, "
            "choose another --output, or add --fresh to start over.",
            param="output",
        )


def _clear(output: Path) -> None:
    """Removes the files of an earlier comparison from `output`, and nothing else."""
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    for name in (REQUEST, PAGE, REPORT):
        (output / name).unlink(missing_ok=True)


# --- the comparison --------------------------------------------------------------------------------------


def _compare(
    spec: ComparisonSpec, folder: Path, training: Path, validation: Path | None, output: Path, device: str
) -> Mapping[str, Any] | None:
    """The report; None if Ctrl-C or SIGTERM stopped the comparison, after a checkpoint."""
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
            bars.print(f"Resuming from {resume.name}.")
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


# --- the result ------------------------------------------------------------------------------------------


def show_report(report: Mapping[str, Any]) -> None:
    """Prints a short form of the page's table, and the verdict."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    for name in (
        "final loss",
        "below LoRA",
        "learning rate",
        "rank",
        "scale",
        "steps to LoRA's loss",
        "time",
        "exported rank",
    ):
        table.add_column(name, justify="right")
    ranked = sorted(report["methods"], key=lambda m: m["final"]["mean"] if m["final"] else float("inf"))
    for method in ranked:
        style = "green" if method["label"] == report["verdict"]["take"] else ""
        is_baseline = method["label"] == report["baseline"]
        table.add_row(*map(Text, _cells(method, is_baseline)), style=style)
    console.print(table)
    for method in ranked:
        if method["problem"]:
            _print(f"{method['label']} has no result: {method['problem']}", "yellow")
    _print(report["verdict"]["sentence"], "bold")


def _cells(method: Mapping[str, Any], is_baseline: bool) -> Sequence[str]:
    final, steps = method["final"], method["steps_to_baseline"]
    if final is None:
        return [method["label"], "none"]
    spread = "" if final["deviation"] is None else f" ± {final['deviation']:.4f}"
    below = final["below_baseline"]
    return [
        method["label"],
        f"{final['mean']:.4f}{spread}",
        "" if below is None or is_baseline else f"{below['mean']:+.4f}",
        f"{method['learning_rate']:g}",
        str(method["rank"]),
        "" if method["scale"] is None else f"{method['scale']:.3g}",
        "never" if steps is None else f"{steps:.0f}",
        f"{method['seconds']:.1f} s",
        "merged only" if method["exported_rank"] is None else str(method["exported_rank"]),
    ]


def _print(message: str, style: str) -> None:
    console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)
