"""The body that creates a comparison, and the object of one."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from olora_core.specs import MAX_SEEDS, ComparisonSpec, check_judging, read_comparison
from store.models import Job

from ..errors import BadRequest
from .bodies import (
    JobOptions,
    MethodRequest,
    RequestBody,
    check_metadata,
    columns_of,
    hyperparameters_of,
    read_request,
    running_of,
    whole_seconds,
)
from .jobs import JobError

RESULTS = ("page", "report")
"""The names of the result files, in order."""
SPEC_FIELDS = ("methods", "learning_rates", "seeds", "seed", "budget", "search_share")
"""The fields that `read_comparison` validates; null is the same as leaving one out."""


class CreateComparison(RequestBody):
    """The body of POST /v1/comparisons."""

    model: str = Field(min_length=1, max_length=256, description="Id of a base model; see GET /v1/models.")
    training_file: str = Field(min_length=1, max_length=64, description="Id of an uploaded file.")
    validation_file: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Id of a file of held-out data, used only for the final results, never for tuning. "
        "Without it, olora.validation_share holds out some of the training rows.",
    )
    methods: Any = Field(
        default=None,
        description='What to compare: ["olora", {"method": "adalora", "rank": 16}, …], or "all". '
        "A method without a rank gets the one whose trainable parameters are nearest to the budget.",
    )
    learning_rates: Any = Field(
        default=None, description='Learning rates to try for every method; "auto": around its default.'
    )
    seeds: Any = Field(
        default=None, description=f"Runs of each method at its best learning rate, 1 to {MAX_SEEDS}."
    )
    seed: Any = Field(default=None, description="First random seed, 0 by default; the search uses it too.")
    budget: Any = Field(
        default=None, description='Trainable parameters per method; "auto": those of LoRA at rank 8.'
    )
    search_share: Any = Field(
        default=None,
        description="Share of the training rows held out for the learning-rate search, 0.1 by default.",
    )
    metadata: dict[str, str] | None = Field(default=None, description="Up to 16 pairs of text.")
    method: MethodRequest | None = None
    hyperparameters: dict[str, Any] | None = Field(
        default=None, description="The same for every run, without the learning rate, which is searched."
    )
    olora: JobOptions | None = None


def read_create(values: dict[str, Any]) -> tuple[CreateComparison, ComparisonSpec]:
    """The request, and the spec of what to compare. Raises BadRequest or SpecError, naming the place."""
    request = read_request(CreateComparison, values)
    check_metadata(request.metadata)
    if request.validation_file == request.training_file:
        raise BadRequest(
            "validation_file is the training file: on rows that every run has trained on, the results would "
            "show how well the methods memorise. Upload other rows and pass the file's id.",
            param="validation_file",
        )
    if request.olora is not None and request.olora.devices != 1:
        raise BadRequest(
            f"olora.devices = {request.olora.devices}, but a comparison runs on one device; leave it out.",
            param="olora.devices",
        )
    if request.olora is not None and request.olora.base is not None:
        raise BadRequest("olora.base is for jobs on an uploaded adapter; leave it out.", param="olora.base")
    if request.olora is not None and request.olora.max_train_tokens is not None:
        raise BadRequest(
            "olora.max_train_tokens is a limit for jobs; limit a comparison with olora.max_seconds.",
            param="olora.max_train_tokens",
        )
    return request, _spec_of(request)


def _spec_of(request: CreateComparison) -> ComparisonSpec:
    type, hyperparameters, prefix = hyperparameters_of(request.method, request.hyperparameters)
    given = {name: getattr(request, name) for name in SPEC_FIELDS if getattr(request, name) is not None}
    options = request.olora or JobOptions()
    spec = read_comparison(
        model=request.model,
        type=type,
        hyperparameters=hyperparameters,
        validation_share=options.validation_share,
        group_by=options.group_by,
        columns=columns_of(request.olora),
        prefix=prefix,
        **given,
    )
    check_judging(spec, given=request.validation_file is not None, place="olora.")
    return spec


class ComparisonProgress(BaseModel):
    """A comparison's progress. `total_steps` and `runs` are as planned so far; the search may add to them."""

    step: int
    total_steps: int | None
    run: int | None = None
    runs: int | None = None
    run_step: int | None = None
    run_steps: int | None = None
    method: str | None = None
    stage: Literal["search", "final"] | None = None
    learning_rate: float | None = None
    seed: int | None = None
    loss: float | None = None


class ComparisonObject(BaseModel):
    """A comparison. Once it has succeeded, `verdict`, `winner` (the best method's spec) and `figures` sum up
    its report.
    """

    id: str
    object: Literal["comparison"] = "comparison"
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    status: str
    model: str
    training_file: str
    validation_file: str | None
    method: dict[str, Any]
    methods: list[dict[str, Any]]
    learning_rates: Literal["auto"] | list[float]
    seeds: int
    seed: int
    budget: Literal["auto"] | int
    search_share: float
    hyperparameters: dict[str, Any]
    metadata: dict[str, str] | None
    progress: ComparisonProgress
    error: JobError | None
    results: dict[str, str]
    verdict: dict[str, Any] | None
    winner: dict[str, Any] | None
    figures: list[dict[str, Any]] | None
    olora: dict[str, Any]

    @classmethod
    def of(cls, row: Job) -> "ComparisonObject":
        spec, findings = row.spec, row.findings or {}
        hyperparameters = spec["hyperparameters"]
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            started_at=whole_seconds(row.started_at),
            finished_at=whole_seconds(row.finished_at),
            estimated_finish=whole_seconds(row.estimated_finish) if row.status == "running" else None,
            status=row.status,
            model=row.model,
            training_file=row.training_file,
            validation_file=row.validation_file,
            method={"type": spec["type"], spec["type"]: {"hyperparameters": hyperparameters}},
            methods=[_as_requested(method) for method in spec["methods"]],
            learning_rates=spec["learning_rates"],
            seeds=spec["seeds"],
            seed=row.seed,
            budget=spec["budget"],
            search_share=spec["search_share"],
            hyperparameters=hyperparameters,
            metadata=row.job_metadata,
            progress=ComparisonProgress(step=row.step, total_steps=row.total_steps, **(row.at_run or {})),
            error=JobError(**row.error) if row.error else None,
            results=dict(zip(RESULTS, row.result_files, strict=False)),
            verdict=findings.get("verdict"),
            winner=findings.get("winner"),
            figures=findings.get("methods"),
            olora=running_of(row),
        )


def _as_requested(method: dict[str, Any]) -> dict[str, Any]:
    """The method's `adapter` object as requested, without a rank that the budget determines."""
    chosen = {"rank"} if method["match_budget"] else set()
    return {name: value for name, value in method["adapter"].items() if name not in chosen}
