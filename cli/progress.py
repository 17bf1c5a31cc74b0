"""The progress bars of a training run and of a comparison: steps, losses, time left."""

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from olora_core.progress import ComparedStep, RunFinished


class TrainingBar:
    """A live bar that says what a run is doing; on a pipe it prints a line now and then instead."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._progress.add_task("waiting", total=None, count="", figures="")
        self._printed_step = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._valid_loss: float | None = None

    def __enter__(self) -> "TrainingBar":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """What comes before and after the steps: loading, tokenising, exporting."""
        if name == self._progress.tasks[0].description and total is None:
            return
        count = f"{done}/{total}" if total else ""
        self._progress.update(
            self._task, description=name, completed=done, total=total or None, count=count, figures=""
        )

    def step(
        self,
        step: int,
        total_steps: int,
        *,
        loss: float | None = None,
        valid_loss: float | None = None,
        tokens: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """One optimizer step is done; `tokens` in `seconds`. A figure that is not known is left out."""
        self._valid_loss = self._valid_loss if valid_loss is None else valid_loss
        if tokens and seconds:
            self._recent.append((tokens, seconds))
        line = "  ".join(
            filter(None, [_named("loss", loss), _named("valid", self._valid_loss), self._speed()])
        )
        count = f"{step}/{total_steps}"
        self._progress.update(
            self._task, description="training", completed=step, total=total_steps, count=count, figures=line
        )
        due = step - self._printed_step >= total_steps / 10 or step == total_steps
        if due and not self.console.is_terminal:
            self._printed_step = step
            self.console.print(f"step {count}  {line}", highlight=False)

    def metrics(self, data: Mapping[str, Any]) -> None:
        """One optimizer step, as a metrics event of the service tells it."""
        self.step(
            data["step"],
            data.get("total_steps") or data["step"],
            loss=data.get("train_loss"),
            valid_loss=data.get("full_valid_loss", data.get("valid_loss")),
            tokens=data.get("tokens"),
            seconds=data.get("seconds"),
        )

    def _speed(self) -> str:
        seconds = sum(seconds for _, seconds in self._recent)
        return f"{sum(tokens for tokens, _ in self._recent) / seconds:,.0f} tokens/s" if seconds else ""

    def say(self, message: str, style: str = "") -> None:
        """A line above the bar."""
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


class ComparisonBars:
    """Two live bars: the whole comparison, and the run at hand; on a pipe a line for each run that ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._whole = self._progress.add_task("comparing", total=None, count="", figures="")
        self._run = self._progress.add_task("waiting", total=None, count="", figures="")

    def __enter__(self) -> "ComparisonBars":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """What a run does beside its steps."""
        count = f"{done}/{total}" if total else ""
        self._progress.update(
            self._run, description=name, completed=done, total=total or None, count=count, figures=""
        )

    def step(self, step: ComparedStep) -> None:
        self._progress.update(
            self._whole,
            completed=step.step,
            total=step.total_steps,
            count=f"run {step.run}/{step.runs}",
        )
        what = f"seed {step.seed}" if step.stage == "final" else "search"
        self._progress.update(
            self._run,
            description=f"{step.method}, {what}, {step.learning_rate:g}",
            completed=step.run_step,
            total=step.run_steps,
            count=f"{step.run_step}/{step.run_steps}",
            figures=_named("loss", step.loss),
        )

    def finished(self, run: RunFinished) -> None:
        """Above the bars, or on a pipe."""
        what = f"seed {run.seed}" if run.stage == "final" else f"search, {run.steps} steps"
        loss = "not finite" if run.loss is None else f"{run.loss:.4f}"
        self.say(
            f"run {run.run}/{run.runs}  {run.method}, {what}, rate {run.learning_rate:g}: loss {loss}",
            "dim" if run.stage == "search" else "",
        )

    def say(self, message: str, style: str = "") -> None:
        """A line above the bars."""
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def _named(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.3f}"
