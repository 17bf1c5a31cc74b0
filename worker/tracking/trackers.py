"""The process that sends one run to one experiment tracker, through the tracker's own client.

It is a process of its own so that a client that hangs or exits does not affect the job: the worker waits a
while for each answer, then kills the process. One JSON object a line:

    {"begin": TrackedRun}                      answered by {"step": …}, the last one that the tracker has
    {"config": {…}}                            the spec, with its "auto" values resolved
    {"rows": [[step, {chart: number}], …]}
    {"end": {"status": …, "summary": {…}}}     the run is over
    {"leave": {}}                              the run will resume in another process

Each is answered by one object; by {"error": {"kind": …, "missing": …, "detail": …}} when the client failed,
after which the process exits. Accounts and addresses come in this process's environment.
"""

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..parent_death import die_with_parent
from ..protocol import claim_descriptors

Row = tuple[int, dict[str, float]]
SECRETS = (
    *("WANDB_API_KEY", "WANDB_BASE_URL"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
)
"""Variables whose values never leave this process in an error message."""
BEGIN_SECONDS = 30.0
RUN_TAG = "olora.run"
MLFLOW_METRICS_AT_ONCE = 1000
MLFLOW_PARAMS_AT_ONCE = 100
MLFLOW_TEXT = 5000


@dataclass(frozen=True)
class TrackedRun:
    """`options` is the integration's own object; all attempts share the `id`."""

    options: dict[str, Any]
    id: str
    kept_folder: str
    """For files that stay on this machine."""
    scratch_folder: str
    """For files that are removed when this process ends."""


class Tracker(Protocol):
    """One run in one tracker, through its client."""

    def begin(self, run: TrackedRun) -> int:
        """Starts or resumes the run. Returns the last step that the tracker has, 0 for none."""

    def configure(self, config: dict[str, Any]) -> None: ...
    def log(self, rows: list[Row]) -> None: ...
    def end(self, status: str, summary: dict[str, Any]) -> None: ...
    def leave(self) -> None: ...


class Wandb:
    """Weights & Biases. An offline run is a folder, to be uploaded with `wandb sync`."""

    def begin(self, run: TrackedRun) -> int:
        import wandb

        offline = os.environ["WANDB_MODE"] == "offline"
        if offline:
            Path(run.kept_folder).mkdir(parents=True, exist_ok=True)
            self._remove_earlier(Path(run.kept_folder), run.id)
        options = run.options
        self.run = wandb.init(
            project=options["project"],
            entity=options["entity"],
            name=options["name"] or run.id,
            tags=options["tags"],
            id=run.id,
            resume="allow",
            dir=run.kept_folder if offline else run.scratch_folder,
            settings=wandb.Settings(
                init_timeout=BEGIN_SECONDS,
                console="off",
                silent=True,
                disable_git=True,
                save_code=False,
                host="olora",
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        return max(0, int(self.run.step) - 1)

    def _remove_earlier(self, folder: Path, run: str) -> None:
        """An offline run cannot be resumed. It starts again, so `wandb sync` must not find the first part."""
        for earlier in (folder / "wandb").glob(f"offline-run-*-{run}"):
            shutil.rmtree(earlier)

    def configure(self, config: dict[str, Any]) -> None:
        self.run.config.update(config, allow_val_change=True)

    def log(self, rows: list[Row]) -> None:
        for step, points in rows:
            self.run.log(points, step=step)

    def end(self, status: str, summary: dict[str, Any]) -> None:
        self.run.summary.update({"status": status, **summary})
        self.run.finish(exit_code=0 if status == "succeeded" else 1)

    def leave(self) -> None:
        self.run.mark_preempting()
        self.run.finish(exit_code=1)


class Mlflow:
    """MLflow. The tag `olora.run` finds the run again."""

    ENDS = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}  # noqa: RUF012

    def begin(self, run: TrackedRun) -> int:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        options = run.options
        experiment = self._experiment(options["experiment"])
        known = self.client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.id}'", max_results=1)
        if known:
            stored = known[0]
            self.client.update_run(stored.info.run_id, status="RUNNING")
        else:
            tags = {**(options["tags"] or {}), RUN_TAG: run.id}
            stored = self.client.create_run(experiment, tags=tags, run_name=options["run_name"] or run.id)
        self.id = stored.info.run_id
        self.step = self._last_step()
        return self.step

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except MlflowException:  # another job has created it meanwhile
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _last_step(self) -> int:
        """From the learning rate, which every step has."""
        history = self.client.get_metric_history(self.id, "train/learning_rate")
        return max((metric.step for metric in history), default=0)

    def configure(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        known = self.client.get_run(self.id).data.params  # MLflow refuses to change a parameter
        new = {name: value for name, value in flat(config).items() if name not in known}
        params = [Param(name, str(value)[:MLFLOW_TEXT]) for name, value in new.items()]
        for start in range(0, len(params), MLFLOW_PARAMS_AT_ONCE):
            self.client.log_batch(self.id, params=params[start : start + MLFLOW_PARAMS_AT_ONCE])

    def log(self, rows: list[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(chart, number, now, step) for step, points in rows for chart, number in points.items()
        ]
        for start in range(0, len(metrics), MLFLOW_METRICS_AT_ONCE):
            self.client.log_batch(self.id, metrics=metrics[start : start + MLFLOW_METRICS_AT_ONCE])
        self.step = rows[-1][0]

    def end(self, status: str, summary: dict[str, Any]) -> None:
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        facts = flat(summary, "/")
        numbers = {
            n: float(v) for n, v in facts.items() if isinstance(v, int | float) and not isinstance(v, bool)
        }
        self.client.log_batch(
            self.id,
            metrics=[Metric(name, number, now, self.step) for name, number in numbers.items()],
            tags=[
                RunTag(f"olora.{name}", str(value)[:MLFLOW_TEXT])
                for name, value in facts.items()
                if name not in numbers
            ],
        )
        self.client.set_terminated(self.id, self.ENDS[status])

    def leave(self) -> None:
        """The run stays "RUNNING"."""


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def flat(values: dict[str, Any], between: str = ".", prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; nulls are left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, between, f"{prefix}{name}{between}")
        elif value is not None:
            found[prefix + name] = value
    return found


def handle(tracker: Tracker, message: dict[str, Any]) -> dict[str, Any]:
    """Passes one message to the tracker. Returns the answer."""
    match message:
        case {"begin": run}:
            return {"step": tracker.begin(TrackedRun(**run))}
        case {"config": config}:
            tracker.configure(config)
        case {"rows": rows}:
            tracker.log([(step, points) for step, points in rows])
        case {"end": {"status": status, "summary": summary}}:
            tracker.end(status, summary)
        case {"leave": _}:
            tracker.leave()
    return {"done": True}


def described(error: BaseException) -> dict[str, Any]:
    """An error without secrets: a client's message may quote a key or an address."""
    code = getattr(error, "error_code", None)
    kind = type(error).__name__ + (f" {code}" if isinstance(code, str) else "")
    return {"kind": kind, "missing": isinstance(error, ImportError), "detail": without_secrets(str(error))}


def without_secrets(text: str) -> str:
    values = {value for name in SECRETS if (value := os.environ.get(name))}
    parts = [urlsplit(value) for value in values if "://" in value]
    pieces = {piece for p in parts for piece in (p.netloc, p.hostname, p.path) if piece and piece != "/"}
    for secret in sorted(values | pieces, key=len, reverse=True):
        text = text.replace(secret, "…")
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("tracker", choices=TRACKERS)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    os.umask(0o077)
    received, sent = claim_descriptors()
    tracker = TRACKERS[arguments.tracker]()
    for line in received:
        try:
            answer = handle(tracker, json.loads(line))
        except Exception as error:
            answer = {"error": described(error)}
        sent.write(json.dumps(answer).encode() + b"\n")
        sent.flush()
        if "error" in answer:
            sys.exit(1)


if __name__ == "__main__":
    main()
