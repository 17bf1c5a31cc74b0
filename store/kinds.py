"""The kinds of work that share the jobs' table and a job's life: what each is called and asked for with."""

from dataclasses import dataclass

from olora_core.specs import ComparisonSpec, TrainSpec

Work = TrainSpec | ComparisonSpec


@dataclass(frozen=True)
class Kind:
    """`name` stands in the row, `prefix` begins the ids, `param` is the id's name in errors."""

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
KINDS = {kind.name: kind for kind in (FINE_TUNING, COMPARISON)}


def kind_for(spec: Work) -> Kind:
    """The kind that is asked for with such a spec."""
    return next(kind for kind in KINDS.values() if isinstance(spec, kind.spec))
