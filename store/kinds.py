"""The kinds of work that share the jobs table and a job's life cycle, with their names and specs."""

from dataclasses import dataclass

from olora_core.specs import ComparisonSpec, TrainSpec

Work = TrainSpec | ComparisonSpec


@dataclass(frozen=True)
class Kind:
    """`name` is the row's `kind`, `prefix` the start of its ids, `param` the id's name in errors."""

    name: str
    prefix: str
    param: str
    noun: str
    """In full: "No such fine-tuning job"."""
    word: str
    """In short: "The job failed"."""
    spec: type[TrainSpec] | type[ComparisonSpec]


FINE_TUNING = Kind("fine_tuning", "ftjob-", "fine_tuning_job_id", "fine-tuning job", "job", TrainSpec)
COMPARISON = Kind("comparison", "cmp-", "comparison_id", "comparison", "comparison", ComparisonSpec)
EXPORT = Kind("export", "ckptexport-", "export_id", "export of a checkpoint", "export", TrainSpec)
"""Makes the adapter of a checkpoint; `store/checkpoints.py`. Its `options` name the checkpoint."""
KINDS = {kind.name: kind for kind in (FINE_TUNING, COMPARISON, EXPORT)}


def kind_for(spec: Work) -> Kind:
    """The kind of work that a spec describes."""
    return next(kind for kind in KINDS.values() if isinstance(spec, kind.spec))
