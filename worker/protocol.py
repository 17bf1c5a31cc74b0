"""The messages between supervisor and trainer: one JSON object a line, over the trainer's pipes.

Supervisor to trainer
    {"job": Order}                                 train this, or compare these
    {"lease": {"run": …, "deadline": seconds}}     the lease was renewed
    {"stop": {"run": …, "request": StopRequest}}   "cancel": at the next step; "release": with a checkpoint

Trainer to supervisor
    {"ready": {"pid": …, "device": …}}             the libraries are loaded
    {"accepted": {"run": …}}                       the job has begun
    {"progress": {"kind": …, …}}                   one item of `train` or `compare`, by its class name
    and one final message on the job: progress of kind "Finished" or "Compared", or
    {"stopped": {"request": …}}                    as requested
    {"failed": {"code", "message", "param"}}       the job fails, as every other attempt would
    {"crashed": {"message"}}                       this attempt fails, another may not; the trainer exits

Deadlines are readings of the monotonic clock, which is the same for all processes of a machine.
"""

import os
import signal
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, BinaryIO, Literal

StopRequest = Literal["cancel", "release"]
FENCED = 75
"""Exit code of a trainer whose lease ran out."""


@dataclass(frozen=True)
class Order:
    """One attempt at one job, as the trainer sees it: a spec and paths.

    `run` names the attempt, so that messages for an earlier one are not taken for this one's.
    """

    run: str
    spec: dict[str, Any]
    base: str
    training: str
    validation: str | None
    folder: str
    resume: str | None
    checkpoint_seconds: float
    deadline: float
    tokens: str | None = None
    """Folder that keeps this project's tokenised files; None keeps none."""
    devices: int = 1
    day: str | None = None
    """The day on which the job was created, in ISO format; chat templates write it as today's date."""
    kind: str = "fine_tuning"
    """Or "comparison", or "export", of the checkpoint in `resume`: the core's generator to run."""
    former: str | None = None
    """Folder with the adapter to train on from."""

    @property
    def created_on(self) -> date | None:
        return date.fromisoformat(self.day) if self.day else None

    def as_message(self) -> dict[str, Any]:
        return {"job": asdict(self)}


def claim_descriptors() -> tuple[BinaryIO, BinaryIO]:
    """Reserves standard input and output for the protocol. Returns both.

    Other code then reads nothing from standard input, and prints to standard error.
    """
    received, sent = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return received, sent


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal."""

    code: int

    @property
    def sentence(self) -> str:
        if self.code == -signal.SIGKILL:
            return "The training process was killed (out of memory?)."
        if self.code < 0:
            return f"The training process was ended by {signal.Signals(-self.code).name}."
        if self.code == FENCED:
            return "The lease could not be renewed in time, so the training process stopped itself."
        return f"The training process ended unexpectedly (exit code {self.code})."
