"""API keys: made at the first start, known afterwards by their SHA-256 alone."""

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
    """Makes sure that there is a key to begin with. Returns it if it was made just now, else None.

    OLORA_API_KEY wins: with it none is made, and without it the one it held before holds no more. When no key
    is left, the one in the home's `api_key` holds; it is made when there is none.
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
        _refuse_revoked(session, token, f"{settings.key_file} holds a key that was revoked; delete the file")
    else:
        token = made = new_token()
        _write_key_file(settings.key_file, token)  # before the row, so that no key is ever unreachable
    session.add(Key(id=new_id("key-"), project_id=project.id, name="first key", digest=digest_of(token)))
    session.flush()
    return made


def _keep_environment_key(session: Session, project: Project, token: str) -> None:
    if find_key(session, token) is not None:
        return
    _refuse_revoked(session, token, "OLORA_API_KEY is a key that was revoked; set another")
    key = session.get(Key, ENVIRONMENT_KEY)
    if key is None:
        key = Key(id=ENVIRONMENT_KEY, project_id=project.id, name="OLORA_API_KEY", digest=digest_of(token))
        session.add(key)
    key.digest, key.revoked_at = digest_of(token), None
    session.flush()


def _refuse_revoked(session: Session, token: str, what: str) -> None:
    """Whoever revoked a key does not want it back. The environment's own may come and go."""
    same = select(Key.id).where(Key.digest == digest_of(token), Key.id != ENVIRONMENT_KEY)
    if session.scalar(same) is not None:
        raise SettingsError(f"{what}, and the next start goes on with a new one.")


def default_project(session: Session) -> Project:
    """The project of a service with one owner, made when it is not there yet."""
    project = session.get(Project, DEFAULT_PROJECT)
    if project is None:
        with contextlib.suppress(IntegrityError), session.begin_nested():  # another start was faster
            session.add(Project(id=DEFAULT_PROJECT, name="Default project"))
        project = session.get_one(Project, DEFAULT_PROJECT)
    return project


def create_key(session: Session, project_id: str, name: str) -> tuple[Key, str]:
    """A further key. The token is returned here and kept nowhere."""
    token = new_token()
    key = Key(id=new_id("key-"), project_id=project_id, name=name, digest=digest_of(token))
    session.add(key)
    session.flush()
    return key, token


def revoke_key(session: Session, key: Key) -> None:
    key.revoked_at = db_now()
    settle(session, key)


def find_key(session: Session, token: str) -> Key | None:
    """The key with this token, unless there is none or it was revoked."""
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
        raise SettingsError(f"{path} is empty; delete it, and the next start makes a new key.")
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
