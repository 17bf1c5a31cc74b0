"""`olora train`: one run described by a spec file, without the service."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from olora_core.errors import SpecError
from olora_core.specs import MAX_SEED, TrainSpec, check_validation, nearest, read_spec, spec_error

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
from .options import Columns, GroupBy, ValidationShare, read_columns
from .progress import TrainingBar
from .samples import show_samples

if TYPE_CHECKING:
    from olora_core.bases.loading import Base
    from olora_core.devices import Devices
    from store.integrations import Integration

    from .charts import Charts

RUN_FILE = "run.json"
"""In the output folder: the spec as given and as resolved, so that a resumed run uses the same."""
TOKENS = "tokens"
"""In the output folder: the tokenised files, reused by the next run."""
CURVES_FOLDER = "tensorboard"
_LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def _with_text_names(values: Any) -> Any:
    """Names as text: YAML reads `1:` as a number, which the spec would not report as an unknown name."""
    return {str(name): value for name, value in values.items()} if isinstance(values, dict) else values


Named = Annotated[dict[str, Any], BeforeValidator(_with_text_names)]


class RunFile(BaseModel):
    """The content of a spec file: a spec and the paths of its files."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1)
    training_file: Path
    validation_file: Path | None = None
    output: Path
    type: str = "supervised"
    adapter: Named = Field(default_factory=dict)
    hyperparameters: Named = Field(default_factory=dict)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    validation_share: float | None = None
    group_by: str | None = None
    columns: dict[str, str] | None = None
    integrations: list[Any] = Field(default_factory=list)


def train(
    spec_file: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC.yaml",
            help="Spec file: model, training_file, validation_file, output, type, adapter, hyperparameters, "
            "seed, validation_share, group_by, columns, integrations.",
        ),
    ],
    validation_share: ValidationShare = None,
    group_by: GroupBy = None,
    columns: Columns = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard an earlier run in the output folder.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N (auto: a GPU if there is one).")] = "auto",
) -> None:
    """Train on this machine, without the service; prints the folder of the adapter or merged model.

    Ctrl-C saves a checkpoint; the same command resumes from it. Paths in the file are relative to it.

    On several devices: torchrun --nproc-per-node N -m cli.main train SPEC.yaml
    """
    if _ranks()[0] > 0:
        _run_follower(device)
        return
    run = read_run(spec_file)
    asked = read_spec(
        model=run.model,
        type=run.type,
        adapter=run.adapter,
        hyperparameters=run.hyperparameters,
        seed=run.seed,
        validation_share=run.validation_share if validation_share is None else validation_share,
        group_by=run.group_by if group_by is None else group_by,
        columns=read_columns(columns) or run.columns,
    )
    check_validation(asked, given=run.validation_file is not None)
    trackers = _trackers(run)
    here = spec_file.resolve().parent
    training = existing_file(here / run.training_file, "training_file")
    validation = existing_file(here / run.validation_file, "validation_file") if run.validation_file else None
    output = here / run.output
    exported = output / ("model" if asked.adapter.export == "merged" else "adapter")
    if fresh:
        _clear(output)
    elif (exported / "manifest.json").exists():
        raise SpecError(f"{exported} already exists; choose another output or add --fresh.", param="output")
    spec = _recorded(output, asked)
    read = check_data(
        *(training, validation, spec.type, spec.columns),
        literal=spec.hyperparameters.takes_control_tokens,
    )
    folder = base_folder(run.model, here)
    make_output(output)
    print_lines(read)
    if not _train(spec, asked, folder, training, validation, output, device, trackers):
        console.print("Stopped. Run the same command to resume.")
        raise typer.Exit(STOPPED)
    typer.echo(str(exported))


def read_run(path: Path) -> RunFile:
    """Raises SpecError, which names the place in the file and what it must be."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SpecError(f"{path} must be a mapping of names to values, such as 'model: olora-tiny'.")
    for name in content:
        if name not in RunFile.model_fields:
            known = ", ".join(RunFile.model_fields)
            raise SpecError(
                f"{path}: {name} is unknown{nearest(str(name), RunFile.model_fields)}. Known: {known}."
            )
    try:
        return RunFile.model_validate(content)
    except ValidationError as error:
        missing = [str(p["loc"][0]) for p in error.errors() if p["type"] == "missing"]
        if missing:
            raise SpecError(f"{path}: {' and '.join(missing)} must be given.", param=missing[0]) from None
        raise SpecError(f"{path}: {spec_error(error).message}") from None


def _trackers(run: RunFile) -> "list[Integration]":
    """Raises BadIntegration, also for a tracker without an account in the settings."""
    from store.integrations import read_integrations, require_offered
    from store.settings import get_settings

    integrations = read_integrations(run.integrations)
    require_offered(integrations, get_settings())
    return integrations


def _recorded(output: Path, asked: TrainSpec) -> TrainSpec:
    """The spec to train: the resolved one of an unfinished run in `output`, else `asked`."""
    if not (output / RUN_FILE).exists():
        return asked
    try:
        recorded = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
        before, resolved = (TrainSpec.model_validate(recorded[name]) for name in ("asked", "resolved"))
    except (ValueError, KeyError, TypeError):
        raise SpecError(
            f"{output / RUN_FILE} is damaged; choose another output, or add --fresh to start over.",
            param="output",
        ) from None
    if before != asked:
        raise SpecError(
            f"{output} holds an unfinished run with another spec; choose another output, or add --fresh to "
            "start over.",
            param="output",
        )
    return resolved


def _record(output: Path, asked: TrainSpec, resolved: TrainSpec) -> None:
    aside = output / f"{RUN_FILE}.part"
    content = {"asked": asked.model_dump(mode="json"), "resolved": resolved.model_dump(mode="json")}
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, output / RUN_FILE)


def _clear(output: Path) -> None:
    """Removes the files of an earlier run from `output`, and nothing else."""
    import shutil

    for name in ("checkpoints", "adapter", "model", CURVES_FOLDER):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / RUN_FILE).unlink(missing_ok=True)


def _train(
    spec: TrainSpec,
    asked: TrainSpec,
    folder: Path,
    training: Path,
    validation: Path | None,
    output: Path,
    device: str,
    trackers: "list[Integration]",
) -> bool:
    """False if Ctrl-C or SIGTERM stopped the run, after a checkpoint."""
    with TrainingBar(console) as bar, stop_signals() as stopping, ExitStack() as stack:
        bar.phase("loading torch")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for the service's trainer
        from olora_core.data.token_cache import trim
        from olora_core.progress import Finished, Resolved, Samples, Saved, drive
        from olora_core.training.train import train as run_training

        device, devices = stack.enter_context(_devices(device))
        bar.phase("loading the base model")
        resume = newest_checkpoint(output)
        devices.broadcast_object((spec, folder, training, validation, output, resume))
        base = _load(spec, folder, device, devices)
        if resume is not None:
            bar.print(f"Resuming from {resume.name}.")
        charts = stack.enter_context(_charts(output, resume, trackers, bar))
        trim([output / TOKENS])
        progress = run_training(
            *(spec, base, training, validation, output),
            resume=resume,
            cache=output / TOKENS,
            devices=devices,
        )
        updates = stack.enter_context(closing(drive(progress, lambda: "save" if stopping else None)))
        samples: dict[str, Any] | None = None
        for update in updates:
            charts.record(update)
            bar.show_update(update)
            match update:
                case Resolved():
                    _record(output, asked, update.spec)
                case Saved() if stopping:
                    return False
                case Samples():
                    samples = asdict(update)
                case Finished():
                    _summarise(bar, update)
                    show_samples(console, samples)
    return True


def _charts(output: Path, resume: Path | None, trackers: "list[Integration]", bar: TrainingBar) -> "Charts":
    from store.settings import get_settings

    from .charts import Charts

    step = int(resume.name.removeprefix("step-")) if resume else 0
    warn = partial(bar.print, style="yellow")
    return Charts(output / CURVES_FOLDER, step, trackers, get_settings(), warn)


def _ranks() -> tuple[int, int, int]:
    """Rank, number of processes and local rank, as set by torchrun and `accelerate launch`."""
    rank, count, here = (int(os.environ.get(name, fallback)) for name, fallback in _LAUNCHED.items())
    return rank, count, here


@contextmanager
def _devices(device: str) -> Iterator[tuple[str, "Devices"]]:
    """The device of this process, and the processes that train together."""
    import torch

    from olora_core.devices import SINGLE, join

    _, count, here = _ranks()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if count == 1:
        yield device, SINGLE
        return
    if device == "cuda":
        device = f"cuda:{here}"
    with join(device) as devices:
        yield device, devices


def _load(spec: TrainSpec, folder: Path, device: str, devices: "Devices") -> "Base":
    from olora_core.bases.loading import load_base
    from olora_core.bases.precision import compute_dtype
    from olora_core.bases.sharding import is_sharded, shard

    dtype = devices.broadcast_object(compute_dtype(spec, folder, device))
    loaded = partial(
        load_base, folder, name=spec.model, dtype=dtype, quantization=spec.hyperparameters.quantization
    )
    if devices.broadcast_object(is_sharded(spec, folder, device, devices.count)):
        return shard(loaded(device="cpu"), device, devices)
    return loaded(device=device)


def _run_follower(device: str) -> None:
    """Runs as a follower rank: prints nothing and ignores signals, since rank 0 stops the run for all."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from olora_core.training.train import train as run_training

    with _devices(device) as (own, devices):
        spec, folder, training, validation, output, resume = devices.broadcast_object(None)
        base = _load(spec, folder, own, devices)
        run = run_training(
            *(spec, base, training, validation, output),
            resume=resume,
            cache=output / TOKENS,
            devices=devices,
        )
        for _ in run:
            pass


def _summarise(bar: TrainingBar, finished: Any) -> None:
    certificate = finished.certificate
    bar.print(
        f"Trained {finished.trained_tokens:,} tokens in {finished.steps} steps. Adapter verified: largest "
        f"logit difference {certificate['max_abs_logit_diff']:.1e} (allowed {certificate['bound']:.1e}).",
        "green",
    )
    if (written := certificate.get("as_written")) is not None:
        bar.print(
            f"As written in {written['dtype']}: largest logit difference {written['max_abs_logit_diff']:.1e}."
        )
    before, after = certificate.get("valid_loss_before"), certificate.get("valid_loss_after")
    if before is not None and after is not None:
        bar.print(f"Validation loss {before:.4f} before, {after:.4f} after.")
