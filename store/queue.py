"""The queue: Celery, whose messages only wake workers up. On Redis, or on a folder without any server.

A message may be lost or come twice and nothing happens: the task `run_next` claims the best row, or none.
"""

import fcntl
import json
import logging
import os
import uuid
from pathlib import Path
from queue import Empty
from typing import Any

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.encoding import bytes_to_str, str_to_bytes
from kombu.utils.json import dumps, loads

from .settings import Settings

log = logging.getLogger(__name__)

TASK = "run_next"
QUEUE = "olora"
POLL_SECONDS = 0.1
PUBLISH_SECONDS = 3


class FolderChannel(filesystem.Channel):  # type: ignore[misc]
    """Messages as files. One appears whole or not at all, and exactly one reader gets it.

    Kombu's own channel writes a message where readers look for it, and moves it away by copying; a reader
    that meets half a message dies of it.
    """

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        # Readers take the files in the order of their names: the oldest first, on one machine.
        raise NotImplementedError
