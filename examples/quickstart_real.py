"""A real model learns a task, and is judged by rows that share neither templates nor words with the training:

    make quickstart-real

adds SmolLM2-135M-Instruct (a download of 93 MB, once), starts the service as `make quickstart` does, trains
OLoRA on orders in plain English whose answer is JSON, downloads the adapter, loads it in PEFT, and compares
base and adapter on orders that neither has seen. Exit status 1 if the model has not learned.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.table import Table
from rich.text import Text

from store.settings import get_settings

from . import peft_adapter, service, smollm2
from .service import QuickstartError, console

EXAMPLES = Path(__file__).parent
TRAINING, VALIDATION = EXAMPLES / "orders" / "train.jsonl", EXAMPLES / "orders" / "valid.jsonl"
STEPS = 28
"""Of 8 orders; more of them change the results little, and a laptop needs seconds for each."""
ASKED, SHOWN = 20, 5
"""Validation rows that both models answer, and how many of them are printed. The loss is of all rows."""
LONGEST = 48
"""Tokens of an answer; an expected one has about 30."""
LEAST_RIGHT, MOST_LOSS = 0.5, 0.5
"""What the adapter must reach: this share of wholly right answers, and this part of the base's loss."""


def main() -> int:
    return service.exit_code(run)


def run() -> None:
    settings = get_settings()
    base = smollm2.folder(settings)
    with service.service(settings) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key=service.key_of(settings))
        job = service.follow(client, create_job(client))
        folder = service.download(client, job, settings.home / "quickstart" / job.id)
    before, after = compare(base, folder)
    show(before, after)
    service.show_results(job, folder)
    judge(before, after)


def create_job(client: OpenAI) -> Any:
    job = service.create_job(
        client,
        TRAINING,
        VALIDATION,
        model=smollm2.MODEL,
        hyperparameters={"batch_size": 8, "max_steps": STEPS, "samples": 0},
        suffix="orders",
        seed=42,
    )
    console.print(f"Created {job.id}: OLoRA on {job.model}, {STEPS} steps")
    return job


# What both models make of the validation rows


@dataclass(frozen=True)
class Answered:
    """A model's loss on all rows, and its answers to the first ones."""

    loss: float
    rows: list[Any]
    answers: list[str]

    @property
    def complete(self) -> int:
        """Number of answers that are JSON with exactly the expected fields."""
        return sum(set(order_in(a) or ()) == set(expected(row)) for row, a in self.pairs)

    @property
    def right(self) -> int:
        """Number of answers whose every value is right too."""
        return sum(order_in(a) == expected(row) for row, a in self.pairs)

    @property
    def pairs(self) -> list[tuple[Any, str]]:
        return list(zip(self.rows, self.answers, strict=True))


def expected(row: Any) -> dict[str, Any]:
    order: dict[str, Any] = json.loads(row["messages"][-1]["content"])
    return order


def order_in(answer: str) -> dict[str, Any] | None:
    """The first JSON object in an answer, whatever text stands around it; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(answer[answer.index("{") :])[0]
    except ValueError:
        return None


def compare(base: Path, folder: Path) -> tuple[Answered, Answered]:
    """What the base makes of the rows, and what it makes of them with the adapter. Raises QuickstartError."""
    console.print("Loading the adapter in PEFT, on the untouched base ...")
    rows = [json.loads(line) for line in VALIDATION.read_text(encoding="utf-8").splitlines()]
    model, tokenizer = peft_adapter.load(base, folder, rows)

    def answered(by: Any) -> Answered:
        answers = peft_adapter.answers(by, tokenizer, rows[:ASKED], LONGEST)
        return Answered(peft_adapter.mean_loss(by, tokenizer, rows), rows[:ASKED], answers)

    console.print(f"Asking both models about {ASKED} orders that they have not seen ...")
    with model.disable_adapter():
        before = answered(model)
    return before, answered(model.merge_and_unload())  # merged, it answers faster


# What a person sees


def show(before: Answered, after: Answered) -> None:
    for row, old, new in list(zip(before.rows, before.answers, after.answers, strict=True))[:SHOWN]:
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_row("order", Text(" ".join(row["messages"][1]["content"].split())))
        table.add_row("base", Text(old))
        table.add_row("tuned", Text(new, style="green"))
        table.add_row("expected", Text(row["messages"][-1]["content"]))
        console.print(table)
        console.print()
    table = Table("on orders that neither has seen", "base", "tuned", box=None, padding=(0, 2))
    table.add_row("loss, nats per token", f"{before.loss:.3f}", f"{after.loss:.3f}")
    for name, count in (("the four fields as JSON", "complete"), ("every value right", "right")):
        shares = (f"{getattr(answered, count)} of {len(answered.rows)}" for answered in (before, after))
        table.add_row(name, *shares)
    console.print(table)


def judge(before: Answered, after: Answered) -> None:
    """Raises QuickstartError if the adapter has learned too little."""
    if after.loss > MOST_LOSS * before.loss or after.right < LEAST_RIGHT * len(after.rows):
        raise QuickstartError(
            f"The model has not learned the task: expected were a loss of at most "
            f"{MOST_LOSS * before.loss:.3f} and {LEAST_RIGHT * len(after.rows):.0f} right answers."
        )


if __name__ == "__main__":
    sys.exit(main())
