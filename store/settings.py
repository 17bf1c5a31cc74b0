"""Every setting of the service, read from `OLORA_…` variables. Nothing else reads the environment."""

import difflib
import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from olora_core.specs.validation import requirement, shown

from .errors import SettingsError

log = logging.getLogger(__name__)

PREFIX = "OLORA_"
NOT_SETTINGS = (
    "OLORA_TEST_",
    "OLORA_BENCH_",
    "OLORA_REQUIRE_SERVICES",
    "OLORA_BASE_URL",
    "OLORA_DIE_WITH_PARENT",
)
"""Variables of tests, benchmarks and clients, and those that our processes pass to each other."""


def _in_home(scheme: str, name: str) -> Any:
    return lambda values: f"{scheme}:///{str(values['home'] / name).lstrip('/')}"


def _database_in_home(values: dict[str, Any]) -> str:
    return f"sqlite:///{values['home'] / 'olora.db'}"


def _lease_by_database(values: dict[str, Any]) -> float:
    return 15.0 if values["database_url"].startswith("sqlite") else 60.0


def _aliases(value: Any) -> Any:
    """(name or pattern, base model) of each pair in the variable."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    aliases = tuple((name.strip(), base.strip()) for name, _, base in pairs)
    for name, base in aliases:
        if not name or not base or len(name) > 256 or name.startswith("ft:") or set("[]*?") & set(base):
            raise ValueError("must be comma-separated pairs such as gpt-4o-mini*=olora-tiny")
        if "[" in name:
            raise ValueError("may use * and ? in names, and no [")
    return aliases


class Settings(BaseSettings):
    """The configuration of the service. With the defaults it runs on its own in `~/.olora`."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, validate_default=True
    )

    home: Path = Field(
        default=Path("~/.olora"),
        description="Folder of everything the service keeps, unless a setting below says otherwise.",
    )
    host: str = Field(default="127.0.0.1", description="Address that the server listens on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port that the server listens on.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Host names that requests may use, as comma-separated patterns; unset: any.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="The API key; unset: one is created at the first start, in `api_key` in the home.",
    )
    database_url: str = Field(
        default_factory=_database_in_home,
        repr=False,
        description="The database: `sqlite:///path` or `postgresql://user:password@host/name`.",
        json_schema_extra={"shown": "a SQLite file in the home"},
    )
    broker_url: str = Field(
        default_factory=_in_home("folder", "queue"),
        repr=False,
        description="The queue that wakes workers: `folder:///path` or `redis://host:6379/0`.",
        json_schema_extra={"shown": "a folder in the home"},
    )
    storage_url: str = Field(
        default_factory=_in_home("file", "storage"),
        repr=False,
        description="The storage of uploaded and produced files: `file:///path`.",
        json_schema_extra={"shown": "a folder in the home"},
    )
    models_dir: Path | None = Field(
        default=None,
        description="Folder of base models; each sub-folder with config.json and *.safetensors is one.",
    )
    allowed_hub_models: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Hugging Face ids that may be trained, as comma-separated patterns: `Qwen/*,gpt2`.",
    )
    model_aliases: Annotated[tuple[tuple[str, str], ...], NoDecode, BeforeValidator(_aliases)] = Field(
        default=(),
        description="Other names for base models, comma-separated: `gpt-4o-mini*=olora-tiny`.",
    )
    organization: str = Field(
        default="olora",
        description="Part of the names of fine-tuned models: `ft:<base>:<organization>:<suffix>:…`.",
    )
    lease_seconds: float = Field(
        default_factory=_lease_by_database,
        gt=0,
        le=3600,
        description="A worker that is silent for this long loses its job to another one.",
        json_schema_extra={"shown": "60, on SQLite 15"},
    )
    checkpoint_seconds: float = Field(
        default=60.0, ge=0, le=86400, description="A checkpoint is saved after this many seconds of training."
    )
    kept_epochs: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Number of a job's last epochs whose final checkpoints are kept, as models.",
    )
    export_checkpoints: Literal["on_request", "at_epoch_end"] = Field(
        default="on_request",
        description="When the adapters of these checkpoints are made: `on_request` or `at_epoch_end`.",
    )
    max_failures: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Crashes in a row, without a new checkpoint in between, that fail a job.",
    )
    stall_seconds: float = Field(
        default=600.0,
        gt=0,
        le=86400,
        description="A trainer that reports nothing for this long is considered hung.",
    )
    idle_seconds: float = Field(
        default=600.0,
        ge=0,
        le=86400,
        description="A worker without a job keeps its base model in memory for this long.",
    )
    devices_per_worker: int = Field(
        default=1,
        ge=1,
        le=64,
        description="GPUs per worker (on a CPU: processes), the maximum for a job's `olora.devices`.",
    )
    max_upload_mb: int = Field(default=512, ge=1, le=1_048_576, description="Largest upload, in MB (2^20).")
    min_examples: int = Field(default=10, ge=1, description="Minimum number of rows in a training file.")
    token_cache_mb: int = Field(
        default=10240,
        ge=0,
        description="Size of a worker's cache of tokenised files, in MB (2^20); 0: no cache.",
    )
    wandb_api_key: SecretStr | None = Field(
        default=None, description="API key of the Weights & Biases account that jobs may report to."
    )
    wandb_base_url: str | None = Field(
        default=None,
        repr=False,
        description="A self-hosted Weights & Biases server: `https://host`; unset: the public one.",
    )
    wandb_mode: Literal["online", "offline"] = Field(
        default="online",
        description="`offline` needs no key: runs are kept in `trackers` in the home, for `wandb sync`.",
    )
    mlflow_tracking_uri: str | None = Field(
        default=None,
        repr=False,
        description="The MLflow server or database that jobs may report to: `https://user:password@host` or `sqlite:///path`.",
    )
    mlflow_token: SecretStr | None = Field(
        default=None, description="Bearer token for the MLflow server, if it needs one."
    )
    log_level: str = Field(default="info", description="debug, info, warning or error.")

    @field_validator("home", "models_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value if value is None else Path(os.path.abspath(value.expanduser()))

    @field_validator("api_key", "wandb_api_key", "mlflow_token")
    @classmethod
    def _key_fits_a_header(cls, value: SecretStr | None, field: ValidationInfo) -> SecretStr | None:
        longest = 4096 if field.field_name == "mlflow_token" else 256
        text = value.get_secret_value().strip() if value else ""
        if not text:
            return None
        if not text.isascii() or not text.isprintable() or " " in text or len(text) > longest:
            raise ValueError(f"must be 1 to {longest} printable ASCII characters without spaces")
        return SecretStr(text)

    @field_validator("database_url")
    @classmethod
    def _known_database(cls, value: str) -> str:
        scheme = value.partition("://")[0]
        if scheme in ("postgres", "postgresql"):
            return "postgresql+psycopg" + value[len(scheme) :]
        if value.startswith("sqlite:///") and ":memory:" not in value and len(value) > len("sqlite:///"):
            return value
        if scheme == "postgresql+psycopg":
            return value
        raise ValueError("must be sqlite:///path/to/file.db or postgresql://user:password@host/name")

    @field_validator("broker_url")
    @classmethod
    def _known_broker(cls, value: str) -> str:
        if value.partition("://")[0] in ("redis", "rediss") or value.startswith("folder:///"):
            return value
        raise ValueError("must be redis://host:6379/0, rediss://… or folder:///path")

    @field_validator("storage_url")
    @classmethod
    def _known_storage(cls, value: str) -> str:
        if value.startswith("file:///"):
            return value
        raise ValueError("must be file:///path (other kinds of storage are not supported yet)")

    @field_validator("wandb_base_url")
    @classmethod
    def _known_server(cls, value: str | None) -> str | None:
        if value is None or value.startswith(("https://", "http://")):
            return value
        raise ValueError("must be https://host or http://host")

    @field_validator("mlflow_tracking_uri")
    @classmethod
    def _known_mlflow(cls, value: str | None) -> str | None:
        if value is None or value.startswith(("https://", "http://", "sqlite:///")):
            return value
        raise ValueError("must be https://host, http://host or sqlite:///path/to/file.db")

    @field_validator("allowed_hub_models", "allowed_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("organization")
    @classmethod
    def _fits_model_names(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", value):
            raise ValueError(
                "must be 1 to 32 lower-case letters, digits and hyphens, the first of them not a hyphen"
            )
        return value

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, value: str) -> str:
        if value.lower() not in ("debug", "info", "warning", "error"):
            raise ValueError("must be debug, info, warning or error")
        return value.lower()

    @property
    def max_upload_bytes(self) -> int:
        return self.max_upload_mb * 2**20

    @property
    def storage_folder(self) -> Path:
        return _path_of(self.storage_url)

    @property
    def queue_folder(self) -> Path | None:
        """The folder that wake-ups travel through; None when there is a Redis."""
        return _path_of(self.broker_url) if self.broker_url.startswith("folder:") else None

    @property
    def scratch_folder(self) -> Path:
        """Where workers keep what they can lose."""
        return self.home / "scratch"

    @property
    def tokens_folder(self) -> Path:
        """Where workers keep tokenised files, a folder for each project."""
        return self.home / "tokens"

    @property
    def added_models_folder(self) -> Path:
        """The base models that `olora models add` made."""
        return self.home / "models"

    @property
    def trackers_folder(self) -> Path:
        """Where Weights & Biases' offline runs are kept."""
        return self.home / "trackers"

    @property
    def key_file(self) -> Path:
        return self.home / "api_key"


def _path_of(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def read_settings(**values: Any) -> Settings:
    """Settings from the environment; `values` win.

    Raises SettingsError, naming the variable and what it must be.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        problem = next(p for p in problems if p["type"] != "default_factory_not_called")
        field = str(problem["loc"][0])
        name = PREFIX + field.upper()
        got = "" if _is_secret(field) else f", got {shown(problem['input'])}"
        raise SettingsError(f"{name} {requirement(problem)}{got}.", param=name) from None


def _is_secret(field: str) -> bool:
    """Whether a setting is a key, or a URL, which may hold a password."""
    info = Settings.model_fields[field]
    return not info.repr or info.annotation == SecretStr | None


@lru_cache
def get_settings() -> Settings:
    """The settings of this process, read once; unknown OLORA_ variables are named in the log."""
    for sentence in unknown_variables(os.environ):
        log.warning(sentence)
    return read_settings()


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """One sentence for each OLORA_ variable that is no setting."""
    known = [name.upper() for name in Settings.model_fields]
    sentences = []
    for name in sorted(environ):
        own = name.removeprefix(PREFIX)  # without the prefix that all share
        if name.startswith(PREFIX) and not name.startswith(NOT_SETTINGS) and own not in known:
            near = difflib.get_close_matches(own, known, n=1, cutoff=0.7)
            hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
            sentences.append(f"{name} is not a setting and is ignored.{hint}")
    return sentences


def settings_table() -> list[tuple[str, str, str]]:
    """(variable, default, description) of every setting, for the documentation."""
    rows = []
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        default = extra.get("shown", "" if field.default in (None, ()) else field.default)
        rows.append((PREFIX + name.upper(), str(default), str(field.description)))
    return rows
