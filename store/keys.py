"""API keys: created at the first start; only their SHA-256 is stored."""

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from .errors import SettingsError
from .home import make_folder
from .models import Key, Project, new_id
from .session import db_now, settle
from .settings import Settings

PREFIX = "sk-olora-"
DEFAULT_PROJECT = "default"
ENVIRONMENT_KEY = "key-environment"
"""The row of OLORA_API_KEY."""


def first_key(session: Session, settings: Settings) -> str | None:
    """Makes sure that a key exists. Returns it if it was created just now, else None.

    If OLORA_API_KEY is set, it is the bootstrap key; unsetting it revokes that key. Otherwise, unless another
    key is valid, `$OLORA_HOME/api_key` is used and created if absent. Raises SettingsError.
    """
    project = default_project(session)
    session.execute(select(Project).where(Project.id == project.id).with_for_update())  # one start at a time
    if settings.api_key is not None:
        _keep_environment_key(session, project, settings.api_key.get_secret_value())
        return None
    stale = session.get(Key, ENVIRONMENT_KEY)
    if stale is not None and stale.revoked_at is None:
        revoke_key(session, stale)
    if session.scalar(select(Key.id).where(Key.revoked_at.is_(None)).limit(1)) is not None:
        return None
    made = None
    if settings.key_file.exists():
        token = _read_key_file(settings.key_file)
        remedy = "delete it, and the next start creates a new key."
        _refuse_revoked(session, token, f"{settings.key_file} holds a revoked key; {remedy}")
    else:
        token = made = new_token()
        _write_key_file(settings.key_file, token)  # before the row, so that no key is ever unreachable
    session.add(Key(id=new_id("key-"), project_id=project.id, name="first key", digest=digest_of(token)))
    session.flush()
    return made


def _keep_environment_key(session: Session, project: Project, token: str) -> None:
    if find_key(session, token) is not None:
        return
    _refuse_revoked(session, token, "OLORA_API_KEY is a revoked key; set another one.")
    key = session.get(Key, ENVIRONMENT_KEY)
    if key is None:
        key = Key(id=ENVIRONMENT_KEY, project_id=project.id, name="OLORA_API_KEY", digest=digest_of(token))
        session.add(key)
    key.digest, key.revoked_at = digest_of(token), None
    session.flush()


def _refuse_revoked(session: Session, token: str, message: str) -> None:
    """Raises SettingsError if the key was revoked. OLORA_API_KEY may be unset and set again."""
    same = select(Key.id).where(Key.digest == digest_of(token), Key.id != ENVIRONMENT_KEY)
    if session.scalar(same) is not None:
        raise SettingsError(message)


def default_project(session: Session) -> Project:
    """The project of a service with one owner, created if it does not exist yet."""
    project = session.get(Project, DEFAULT_PROJECT)
    if project is None:
        with contextlib.suppress(IntegrityError), session.begin_nested():  # another start was faster
            session.add(Project(id=DEFAULT_PROJECT, name="Default project"))
        project = session.get_one(Project, DEFAULT_PROJECT)
    return project


def create_key(session: Session, project_id: str, name: str) -> tuple[Key, str]:
    """Creates another key. The token is returned and not stored."""
    token = new_token()
    key = Key(id=new_id("key-"), project_id=project_id, name=name, digest=digest_of(token))
    session.add(key)
    session.flush()
    return key, token


def revoke_key(session: Session, key: Key) -> None:
    key.revoked_at = db_now()
    settle(session, key)


def find_key(session: Session, token: str) -> Key | None:
    """The key with this token; None if it is unknown or revoked."""
    if not token or len(token) > 256:
        return None
    digest = digest_of(token)
    key = session.scalar(select(Key).where(Key.digest == digest, Key.revoked_at.is_(None)))
    return key if key is not None and hmac.compare_digest(key.digest, digest) else None


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def new_token() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def _read_key_file(path: Path) -> str:
    token = path.read_text().strip()
    if not token:
        raise SettingsError(f"{path} is empty; delete it, and the next start creates a new key.")
    return token


def _write_key_file(path: Path, token: str) -> None:
    make_folder(path.parent)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(aside, path)
