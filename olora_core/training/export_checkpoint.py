"""A checkpoint's adapter, exported and certified without the run's data."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ..bases.loading import Base
from ..errors import CheckpointError
from ..export.manifest import RunRecord
from ..layers.adapter import attach, detach
from ..progress import Finished, Note, Phase
from .certified_export import export_certified
from .checkpoint import STATE
from .former import build_former, read_former, whole


def export_checkpoint(
    base: Base, checkpoint: Path, folder: Path
) -> Generator[Note | Phase | Finished, str | None, None]:
    """Exports the adapter (or the merged model) of a checkpoint's folder, and certifies it.

    `base` is loaded as for the run and has no adapters; afterwards it is as before. The optimizer's moments
    are not needed. Raises CheckpointError for a checkpoint of an earlier version, which cannot be exported,
    and ModelError for one of another base.
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if "record" not in state:
        raise CheckpointError(
            f"Checkpoint '{checkpoint.name}' was written by an earlier version and cannot be exported."
        )
    former = read_former(checkpoint)
    built = yield from build_former(former, base)
    adapters = whole(built, former.links)
    losses = [(step, loss) for step, loss, *_ in state["history"]]
    metrics = {"steps": state["step"], "exported_step": state["step"], **_newest(state)}
    record = RunRecord.from_json(state["record"], metrics=metrics, losses=losses)
    attach(base.model, adapters)
    try:
        exported, certificate = yield from export_certified(
            base, adapters, folder, record, state["certificate_rows"], {"exported_step": state["step"]}
        )
    finally:
        detach(base.model)
    yield Finished(exported, certificate, metrics, state["trained_tokens"], state["step"])


def _newest(state: dict[str, Any]) -> dict[str, Any]:
    """The losses that were measured at the checkpoint's step."""
    measured = {"train_loss": state["history"][-1][1]}
    for evaluated in state["evaluations"]:
        if evaluated["step"] == state["step"]:
            measured |= {"valid_loss_after": evaluated["loss"], "valid_accuracy_after": evaluated["accuracy"]}
    return measured
