"""Progress bars for a training run and for a comparison: steps, losses, time left."""

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from olora_core.progress import ComparedStep, Evaluated, Note, Phase, Resolved, RunFinished, Step

LEVELS = {"warn": "yellow", "error": "red"}


class LiveBars:
    """Progress bars that stay below what is printed. On a pipe only the printed lines appear."""

    _run: TaskID
    """The bar of the current run, which each subclass adds."""

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

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def _add(self, name: str) -> TaskID:
        return self._progress.add_task(name, total=None, count="", figures="")

    def phase(self, name: str, done: int = 0, total: int | None = None) -> None:
        """What happens before and after the steps: loading, tokenising, exporting."""
        if name == self._progress.tasks[self._run].description and total is None:
            return
        count = f"{done}/{total}" if total else ""
        self._progress.update(
            self._run, description=name, completed=done, total=total or None, count=count, figures=""
        )

    def show_update(self, update: object) -> None:
        """`update` is one that the core's `train` or `compare` yields; some are not shown."""
        match update:
            case Phase():
                self.phase(update.name, update.done, update.total)
            case Note():
                self.print(update.message, LEVELS.get(update.level, ""))

    def show_event(self, event: Mapping[str, Any]) -> None:
        """`event` as the service's API returns it."""
        self.print(event["message"], LEVELS.get(event["level"], ""))

    def show_progress(self, current: Mapping[str, Any]) -> None:
        """`current` is the unfinished job or comparison, as the service's API returns it."""
        stage = current["olora"]["stage"]
        if stage is None or current["status"] != "running":
            self.phase(current["status"].replace("_", " "))
        elif stage["name"] != "training":
            self.phase(stage["name"], stage["done"], stage["total"])

    def print(self, message: str, style: str = "") -> None:
        """Prints a line above the bars."""
        self.console.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


class TrainingBar(LiveBars):
    """One run: its steps, losses and speed. On a pipe also about ten lines with these figures."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._run = self._add("waiting")
        self._printed_step = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._valid_loss: float | None = None

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
        """One optimizer step has finished: `tokens` in `seconds`. Unknown figures are left out."""
        self._valid_loss = self._valid_loss if valid_loss is None else valid_loss
        if tokens and seconds:
            self._recent.append((tokens, seconds))
        line = "  ".join(
            filter(None, [_named("loss", loss), _named("valid", self._valid_loss), self._speed()])
        )
        count = f"{step}/{total_steps}"
        self._progress.update(
            self._run, description="training", completed=step, total=total_steps, count=count, figures=line
        )
        due = step - self._printed_step >= total_steps / 10 or step == total_steps
        if due and not self.console.is_terminal:
            self._printed_step = step
            self.console.print(f"step {count}  {line}", highlight=False)

    def metrics(self, data: Mapping[str, Any]) -> None:
        """One optimizer step, from the data of a metrics event."""
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

    def show_update(self, update: object) -> None:
        match update:
            case Resolved():
                for sentence in update.why:
                    self.print(sentence, "dim")
            case Step():
                self.step(
                    update.step,
                    update.total_steps,
                    loss=update.loss,
                    valid_loss=update.valid_loss,
                    tokens=update.tokens,
                    seconds=update.seconds,
                )
            case Evaluated():
                self.print(f"step {update.step}: validation loss {update.loss:.4f}")
            case _:
                super().show_update(update)

    def show_event(self, event: Mapping[str, Any]) -> None:
        data = event.get("data") or {}
        if event["type"] == "metrics" and "step" in data:
            self.metrics(data)
        else:
            super().show_event(event)


class ComparisonBars(LiveBars):
    """The whole comparison, and its current run. Each finished run gets a printed line."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._whole = self._add("comparing")
        self._run = self._add("waiting")

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
        what = f"seed {run.seed}" if run.stage == "final" else f"search, {run.steps} steps"
        loss = "not finite" if run.loss is None else f"{run.loss:.4f}"
        self.print(
            f"run {run.run}/{run.runs}  {run.method}, {what}, rate {run.learning_rate:g}: loss {loss}",
            "dim" if run.stage == "search" else "",
        )

    def show_update(self, update: object) -> None:
        match update:
            case ComparedStep():
                self.step(update)
            case RunFinished():
                self.finished(update)
            case _:
                super().show_update(update)

    def show_event(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "run":
            self.finished(RunFinished(**event["data"]))
        else:
            super().show_event(event)

    def show_progress(self, current: Mapping[str, Any]) -> None:
        if current["status"] == "running" and current["progress"]["run"]:
            self.step(ComparedStep(**current["progress"]))
        else:
            super().show_progress(current)


def _named(name: str, value: float | None) -> str:
    return "" if value is None else f"{name} {value:.3f}"
