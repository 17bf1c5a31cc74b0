"""What `olora jobs` and `olora comparisons` share: both list, watch, pause and cancel."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from store.statuses import ENDED

from .client import ServiceError, connect, send
from .files import send_file
from .progress import LiveBars

POLL_SECONDS = 1.0
STYLES = {
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "paused": "yellow",
    "running": "cyan",
}


@dataclass(frozen=True)
class Resource:
    """A kind of object that runs in the service, as the API and the command line name it."""

    noun: str
    path: str
    command: str


JOBS = Resource("job", "fine_tuning/jobs", "olora jobs")
COMPARISONS = Resource("comparison", "comparisons", "olora comparisons")


def file_id(client: httpx.Client, name: str) -> str:
    """The id of a file, which is uploaded first if `name` is a path."""
    if Path(name).is_file():
        return str(send_file(client, Path(name))["id"])
    if name.startswith("file-"):
        return name
    raise ServiceError(f"{name} is neither an existing file nor a file id (file-…).")


def print_newest(resource: Resource, limit: int, base_url: str | None) -> None:
    with connect(base_url) as client:
        found = send(client, "GET", resource.path, params={"limit": limit})["data"]
    print_table(found, Console(), resource)


def print_table(found: list[dict[str, Any]], to: Console, resource: Resource) -> None:
    """A table that never cuts ids; on a pipe one line each, separated by tabs, for grep and awk."""
    if not to.is_terminal:
        for item in found:
            created = time.strftime("%Y-%m-%dT%H:%M", time.localtime(item["created_at"]))
            cells = [item["id"], item["status"], created, item["model"], _result(item)]
            to.file.write("\t".join(cells) + "\n")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column(
        resource.noun, no_wrap=True, min_width=max((len(item["id"]) for item in found), default=0)
    )
    table.add_column("status", no_wrap=True)
    table.add_column("created", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("result", overflow="fold")
    for item in found:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(item["created_at"]))
        status = Text(item["status"], style=STYLES.get(item["status"], ""))
        table.add_row(item["id"], status, created, Text(item["model"]), Text(_result(item)))
    to.print(table, crop=False)


def _result(item: dict[str, Any]) -> str:
    """The fine-tuned model or the verdict, else the error, on one line."""
    made = item.get("fine_tuned_model") or (item.get("verdict") or {}).get("sentence")
    result = made or (item.get("error") or {}).get("message") or ""
    return " ".join(result.split())


def ask(resource: Resource, id: str, action: str, base_url: str | None) -> None:
    """`action` is "cancel", "pause" or "resume"."""
    with connect(base_url) as client:
        answer = send(client, "POST", f"{resource.path}/{id}/{action}")
    stopping = " (its trainer is stopping)" if answer["olora"]["stopping"] else ""
    typer.echo(f"{id}: {answer['status']}{stopping}")


def watch(client: httpx.Client, resource: Resource, id: str, bars: LiveBars) -> dict[str, Any]:
    """Shows events and progress until the end. Returns the object, which has succeeded.

    Raises ServiceError if it failed, typer.Exit if it was cancelled, and on Ctrl-C, which leaves it running.
    """
    try:
        with bars:
            ended = _follow(client, f"{resource.path}/{id}", bars)
    except KeyboardInterrupt:
        bars.print(
            f"\nStopped watching; the {resource.noun} is still running. "
            f"To watch again: {resource.command} watch {id}"
        )
        raise typer.Exit(130) from None
    if ended["status"] == "failed":
        raise ServiceError(f"{id} failed: {(ended['error'] or {}).get('message', 'no reason given')}")
    if ended["status"] != "succeeded":
        bars.print(ended["status"], "yellow")
        raise typer.Exit(1)
    return ended


def _follow(client: httpx.Client, path: str, bars: LiveBars) -> dict[str, Any]:
    seen: set[str] = set()
    while True:
        current: dict[str, Any] = send(client, "GET", path)
        for event in _new_events(client, path, seen):
            bars.show_event(event)
        if current["status"] in ENDED:
            return current
        bars.show_progress(current)
        time.sleep(POLL_SECONDS)


def _new_events(client: httpx.Client, path: str, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Events not yet in `seen`, oldest first. The service lists the newest first, a page at a time."""
    fresh: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = send(client, "GET", f"{path}/events", params={"limit": 100} | after)
        unseen = [event for event in page["data"] if event["id"] not in seen]
        fresh += unseen
        if not page["has_more"] or len(unseen) < len(page["data"]):
            break
        after = {"after": page["data"][-1]["id"]}
    seen.update(event["id"] for event in fresh)
    yield from reversed(fresh)
