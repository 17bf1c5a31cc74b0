"""What supervisor and trainer say to each other: one JSON object a line, over the trainer's pipes.

Supervisor to trainer
    {"job": Order}                                 train this, or compare these
    {"lease": {"run": …, "deadline": seconds}}     the lease was renewed
    {"stop": {"run": …, "request": StopRequest}}   "cancel": at the next step; "release": with a checkpoint

Trainer to supervisor
    {"ready": {"pid": …, "device": …}}             the libraries are loaded
    {"accepted": {"run": …}}                       the job has begun
    {"progress": {"kind": …, …}}                   one item of `train` or `compare`, by its class name
    and one last word on the job: progress of kind "Finished" or "Compared", or
    {"stopped": {"request": …}}                    as requested
    {"failed": {"code", "message", "param"}}       the job cannot be done
    {"crashed": {"message"}}                       this attempt could not be done; the trainer ends

Deadlines are readings of the monotonic clock, which all processes of a machine share.
"""

import os
import signal
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Literal

StopRequest = Literal["cancel", "release"]
FENCED = 75
"""Exit code of a trainer whose lease ran out."""


@dataclass(frozen=True)
class Order:
    """One attempt at one job, as the trainer sees it: a spec and paths.

    `run` names the attempt, so that nothing meant for an earlier one is taken for this one.
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
    """Where this project's tokenised files are kept; None: nowhere."""
    devices: int = 1
    kind: str = "fine_tuning"
    """Or "comparison": which of the core's generators the spec is for."""

    def as_message(self) -> dict[str, Any]:
        return {"job": asdict(self)}


def claim_descriptors() -> tuple[BinaryIO, BinaryIO]:
    """Takes standard input and output for the protocol, and leaves harmless ones to everybody else."""
    received, sent = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return received, sent


@dataclass(frozen=True)
class Ended:
    """The last thing that comes from a trainer: its exit code, negative for a signal."""

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
