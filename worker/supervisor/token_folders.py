"""Tokenised files that a worker keeps for the next job on the same data, a folder for each project."""

from urllib.parse import quote

from olora_core.data.token_cache import trim
from store.home import make_folder
from store.settings import Settings


def tokens_folder(settings: Settings, project_id: str) -> str | None:
    """A project's tokenised files, never shared with another project; None when none are kept."""
    if not settings.token_cache_mb:
        return None
    folder = settings.tokens_folder / f"project-{quote(project_id, safe='')}"
    make_folder(folder)
    return str(folder)


def trim_tokens(settings: Settings) -> None:
    """Limits the tokenised files of all projects together to `token_cache_mb`."""
    if settings.tokens_folder.is_dir():
        trim(settings.tokens_folder.iterdir(), settings.token_cache_mb * 2**20)
