"""The experiment trackers that a job can report to: Weights & Biases in OpenAI's format, MLflow in the same.

The operator decides which are available: accounts and addresses are settings, never part of a request.
"""

import unicodedata
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from olora_core.specs import nearest
from olora_core.specs.validation import refusal

from .errors import BadIntegration
from .settings import Settings

MAX_INTEGRATIONS = 5


def _printable(text: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ValueError("must be text without control characters")
    return text


def _project(text: str) -> str:
    if set(text) & set("/\\#?%:"):
        raise ValueError("must be a name without / \\ # ? % :")
    return text


def _own_tags(tags: dict[str, str]) -> dict[str, str]:
    if any(name.startswith(("mlflow.", "olora.")) for name in tags):
        raise ValueError("must have names that do not begin with 'mlflow.' or 'olora.', which are reserved")
    return tags


Name = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
Project = Annotated[Name, AfterValidator(_project)]
Tag = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
TagText = Annotated[str, Field(max_length=512), AfterValidator(_printable)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WandbRun(_Strict):
    """A run in Weights & Biases, named after the job's id by default."""

    project: Project
    entity: Project | None = None
    name: Name | None = None
    tags: list[Tag] | None = Field(default=None, max_length=20)


class MlflowRun(_Strict):
    """A run in MLflow, named after the job's id by default."""

    experiment: Name
    run_name: Name | None = None
    tags: Annotated[dict[Tag, TagText], Field(max_length=20), AfterValidator(_own_tags)] | None = None


class WandbIntegration(_Strict):
    title: ClassVar[str] = "Weights & Biases"
    type: Literal["wandb"]
    wandb: WandbRun

    @property
    def place(self) -> tuple[str | None, ...]:
        """Where the run will appear; no two integrations of a job may share it."""
        return self.wandb.entity, self.wandb.project


class MlflowIntegration(_Strict):
    title: ClassVar[str] = "MLflow"
    type: Literal["mlflow"]
    mlflow: MlflowRun

    @property
    def place(self) -> tuple[str | None, ...]:
        return (self.mlflow.experiment,)


Integration = WandbIntegration | MlflowIntegration
INTEGRATIONS: dict[str, type[Integration]] = {"wandb": WandbIntegration, "mlflow": MlflowIntegration}


def read_integrations(values: Any) -> list[Integration]:
    """Raises BadIntegration, naming the place and what it must be."""
    if not isinstance(values, list | tuple):
        raise BadIntegration("integrations must be a list.", param="integrations")
    if len(values) > MAX_INTEGRATIONS:
        raise BadIntegration(
            f"integrations must have at most {MAX_INTEGRATIONS} entries (got {len(values)}).",
            param="integrations",
        )
    read: list[Integration] = []
    for position, value in enumerate(values):
        place = f"integrations[{position}]"
        integration = _read(value, place)
        if any((other.type, other.place) == (integration.type, integration.place) for other in read):
            raise BadIntegration(
                f"{place} has the same destination as an earlier integration; list each once.", param=place
            )
        read.append(integration)
    return read


def _read(value: Any, place: str) -> Integration:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in INTEGRATIONS:
        known = " or ".join(f"'{name}'" for name in INTEGRATIONS)
        raise BadIntegration(
            f'{place} must be an object whose type is {known}, such as {{"type": "wandb", '
            '"wandb": {"project": "…"}}.',
            param=f"{place}.type" if isinstance(value, dict) else place,
        )
    try:
        return INTEGRATIONS[kind].model_validate(value)
    except ValidationError as error:
        raise _refused(error, kind, place) from None


def _refused(error: ValidationError, kind: str, place: str) -> BadIntegration:
    """The first error, as one sentence."""
    problem = error.errors(include_url=False)[0]
    *path, last = problem["loc"]
    param = ".".join([place, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        model = INTEGRATIONS[kind].model_fields[kind].annotation if path else INTEGRATIONS[kind]
        known = model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else {}
        listed = ", ".join(known)
        return BadIntegration(f"{param} is unknown{nearest(str(last), known)}. Known: {listed}.", param=param)
    return BadIntegration(refusal(param, problem), param=param)


def require_offered(integrations: list[Integration], settings: Settings) -> None:
    """Raises BadIntegration for a tracker that this service is not configured for."""
    remedies = {
        "wandb": None if offers_wandb(settings) else "OLORA_WANDB_API_KEY, or OLORA_WANDB_MODE to offline",
        "mlflow": None if settings.mlflow_tracking_uri else "OLORA_MLFLOW_TRACKING_URI",
    }
    for position, integration in enumerate(integrations):
        if remedy := remedies[integration.type]:
            raise BadIntegration(
                f"{integration.title} is not configured on this service: leave the integration out, or ask "
                f"the operator to set {remedy}. The TensorBoard file has every metric as well.",
                param=f"integrations[{position}].type",
                code="integration_not_configured",
            )


def offers_wandb(settings: Settings) -> bool:
    return settings.wandb_mode == "offline" or settings.wandb_api_key is not None
