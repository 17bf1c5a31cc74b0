"""The body that creates a comparison, and the object of one."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from olora_core.specs import MAX_SEEDS, ComparisonSpec, read_comparison
from store.models import Job

from ..errors import BadRequest
from .bodies import JobOptions, MethodRequest, RequestBody, check_metadata, hyperparameters_of, read_request
from .jobs import JobError, whole_seconds

RESULTS = ("page", "report")
"""What the result files are, in their order."""


LOOSE = ("methods", "learning_rates", "seeds", "seed", "budget", "search_share")
"""What `read_comparison` reads by itself; null stands for what is left out."""


class CreateComparison(RequestBody):
    """The body of POST /v1/comparisons."""

    model: str = Field(min_length=1, max_length=256, description="Id of a base model; see GET /v1/models.")
    training_file: str = Field(min_length=1, max_length=64, description="Id of an uploaded file.")
    validation_file: str = Field(
        min_length=1, max_length=64, description="Id of an uploaded file; what the methods are judged on."
    )
    methods: Any = Field(
        default=None,
        description='What to compare: ["olora", {"method": "adalora", "rank": 16}, …], or "all". '
        "Without a rank a method gets the one whose trained numbers are nearest to the budget.",
    )
    learning_rates: Any = Field(
        default=None, description='The rates to try for every method; "auto": around each one\'s own.'
    )
    seeds: Any = Field(default=None, description=f"Runs of each method at its best rate, 1 to {MAX_SEEDS}.")
    seed: Any = Field(default=None, description="The first of them, 0 if left out; the search's as well.")
    budget: Any = Field(
        default=None, description='Trained numbers of each method; "auto": those of LoRA at rank 8.'
    )
    search_share: Any = Field(
        default=None, description="Share of the training rows, 0.1, that the search for rates is judged on."
    )
    metadata: dict[str, str] | None = Field(default=None, description="Up to 16 pairs of text.")
    method: MethodRequest | None = None
    hyperparameters: dict[str, Any] | None = Field(
        default=None, description="Of every run alike; the learning rate is searched, not given."
    )
    olora: JobOptions | None = None


def read_create(values: dict[str, Any]) -> tuple[CreateComparison, ComparisonSpec]:
    """The request, and the spec of what to compare. Raises BadRequest or SpecError, naming the place."""
    if values.get("validation_file") is None:
        raise BadRequest(
            "validation_file is missing: a comparison is judged on rows that no run has trained on and no "
            "learning rate was chosen by. Upload some and name their file.",
            param="validation_file",
        )
    request = read_request(CreateComparison, values)
    check_metadata(request.metadata)
    if request.validation_file == request.training_file:
        raise BadRequest(
            "validation_file is the training file: rows that every run has trained on tell the methods "
            "apart by how well they memorise. Upload other rows and name their file.",
            param="validation_file",
        )
    if request.olora is not None and request.olora.devices != 1:
        raise BadRequest(
            f"olora.devices = {request.olora.devices}: a comparison runs on one device; leave it out.",
            param="olora.devices",
        )
    return request, _spec_of(request)


def _spec_of(request: CreateComparison) -> ComparisonSpec:
    type, hyperparameters, prefix = hyperparameters_of(request.method, request.hyperparameters)
    asked = {name: getattr(request, name) for name in LOOSE if getattr(request, name) is not None}
    return read_comparison(
        model=request.model, type=type, hyperparameters=hyperparameters, prefix=prefix, **asked
    )


class ComparisonProgress(BaseModel):
    """Where a comparison is. `total_steps` and `runs` are the plan so far; the search may add to it."""

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
    """A comparison. `verdict`, `winner` (the spec of the method to take) and `figures` are the short of its
    report, once it has succeeded.
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
    validation_file: str
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
            validation_file=row.validation_file or "",
            method={"type": spec["type"], spec["type"]: {"hyperparameters": hyperparameters}},
            methods=[_asked(method) for method in spec["methods"]],
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
            olora={
                **row.options,
                "attempt": row.attempt,
                "failures": row.failures,
                "requested": row.stop_request,
            },
        )


def _asked(method: dict[str, Any]) -> dict[str, Any]:
    """The method's adapter object, as it may be sent again: without the rank that the budget will choose."""
    chosen = {"rank"} if method["match_budget"] else set()
    return {name: value for name, value in method["adapter"].items() if name not in chosen}
