"""Stored bytes are complete or absent, stay inside their folder, and agree with their rows."""

import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

import pytest
from sqlalchemy import select

from store import control, files, jobs, storage
from store.errors import FileInUse, NotFound, StorageError, StorageFull, TooLarge, UnknownCursor
from store.models import File, Job
from store.session import Sessions, db_now
from store.settings import Settings
from store.storage import MANIFEST, Storage
from tests.store import making

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "storage")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    (folder / "native").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(3_000_000))
    (folder / "manifest.json").write_text("{}")
    (folder / "native" / "A0.safetensors").write_bytes(b"A0")
    return folder


def everything_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def write(
    store: Storage, key: str, data: bytes, *, max_bytes: int | None = None, error: Exception | None = None
) -> None:
    """In two pieces; `error` happens before the end."""
    with store.writer(key, max_bytes=max_bytes) as writer:
        writer.write(data[: len(data) // 2])
        writer.write(data[len(data) // 2 :])
        if error:
            raise error


# --- one file ------------------------------------------------------------------------------------------


def test_what_is_written_is_counted_hashed_and_read_back(store: Storage) -> None:
    with store.writer("files/file-a") as writer:
        writer.write(b"one ")
        writer.write(b"two")
    assert (writer.bytes, writer.sha256) == (7, hashlib.sha256(b"one two").hexdigest())
    with store.open("files/file-a") as file:
        assert file.read() == b"one two"
    assert store.size("files/file-a") == 7


def test_what_is_stored_is_its_owners_alone(tmp_path: Path, adapter: Path) -> None:
    store = Storage(tmp_path / "new" / "storage")
    write(store, "files/file-a", b"private")
    store.put_folder("checkpoints/job/1", adapter)
    made = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert len(made) > 8
    for path in made:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_mode_of_a_home_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    for folder in (tmp_path, tmp_path / "storage"):
        folder.chmod(0o750)
    write(Storage(tmp_path / "storage"), "files/file-a", b"private")
    for folder in (tmp_path, tmp_path / "storage"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_nothing_is_visible_before_the_end(store: Storage) -> None:
    with store.writer("files/file-a") as writer:
        writer.write(b"half")
        assert not store.exists("files/file-a")
        with writer.reread() as file:
            assert file.read() == b"half"
    assert store.exists("files/file-a")


def test_a_write_that_fails_leaves_nothing(store: Storage) -> None:
    with pytest.raises(RuntimeError):
        write(store, "files/file-a", b"half", error=RuntimeError())
    assert everything_in(store.root) == []


def test_a_write_that_fails_keeps_what_was_there(store: Storage) -> None:
    with store.writer("files/file-a") as writer:
        writer.write(b"old")
    with pytest.raises(RuntimeError):
        write(store, "files/file-a", b"new", error=RuntimeError())
    with store.open("files/file-a") as file:
        assert file.read() == b"old"


def test_too_many_bytes_are_refused_and_leave_nothing(store: Storage) -> None:
    write(store, "files/fits", b"x" * 10, max_bytes=10)
    with pytest.raises(TooLarge, match="10 bytes"):
        write(store, "files/file-a", b"x" * 11, max_bytes=10)
    assert everything_in(store.root) == ["files/fits"]


def test_a_missing_key_is_named(store: Storage) -> None:
    for read in (store.open, store.size, lambda key: store.fetch(key, store.root.parent / "copy")):
        with pytest.raises(StorageError, match="files/file-none") as caught:
            read("files/file-none")
        assert caught.value.code == "not_stored"
    store.delete("files/file-none")


def test_put_and_fetch_agree(store: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2_500_000))
    size, sha256 = store.put("files/file-a", source)
    assert (size, sha256) == (2_500_000, hashlib.sha256(source.read_bytes()).hexdigest())
    assert store.fetch("files/file-a", tmp_path / "scratch" / "copy") == sha256
    assert (tmp_path / "scratch" / "copy").read_bytes() == source.read_bytes()


# --- keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../outside",
        "files/../../outside",
        "files/..",
        "files/.",
        "files//file-a",
        "files/",
        ".incoming/x.part",
        "files/.hidden",
        "files\\..\\outside",
        "files/%2e%2e/outside",
        "files/..%2foutside",
        "files/file-a\x00.txt",
        "files/file-a\n",
        "files/ file-a",
        "files/-rf",
        "C:/windows",
        "~root/x",
        "files/a?b",
        "files/a#b",
        "files/．．/outside",
        "files/a\u2215b",
        "files/" + "a" * 201,
        "a/" * 300 + "a",
    ],
)
def test_hostile_keys_are_refused_by_every_operation(store: Storage, tmp_path: Path, key: str) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x")
    folder = tmp_path / "folder"
    folder.mkdir()
    before = everything_in(tmp_path)
    for operation in (
        lambda: store.writer(key),
        lambda: store.open(key),
        lambda: store.size(key),
        lambda: store.exists(key),
        lambda: store.delete(key),
        lambda: store.put(key, source),
        lambda: store.list(key),
        lambda: store.put_folder(key, folder),
        lambda: store.delete_folder(key),
        lambda: store.fetch(key, tmp_path / "copy"),
        lambda: store.fetch_folder(key, tmp_path / "copies"),
    ):
        with pytest.raises(StorageError):
            operation()
    assert everything_in(tmp_path) == before


def test_symbolic_links_are_not_followed(store: Storage, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (store.root / "files").mkdir()
    (store.root / "files" / "file-link").symlink_to(outside / "secret")
    (store.root / "jobs").symlink_to(outside, target_is_directory=True)
    for key in ("files/file-link", "jobs/secret"):
        for operation in (store.open, store.size, store.delete, store.writer, store.exists):
            with pytest.raises(StorageError, match="leads out"):
                operation(key)
    with pytest.raises(StorageError):
        store.delete_folder("jobs")
    assert (outside / "secret").read_text() == "secret"


def test_a_link_in_a_folder_is_not_stored(store: Storage, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (adapter / "link.json").symlink_to(tmp_path / "secret")
    store.put_folder("jobs/j/1/adapter", adapter)
    assert "jobs/j/1/adapter/link.json" not in store.list("jobs")


def test_a_root_behind_a_link_works(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    store = Storage(tmp_path / "link" / "storage")
    with store.writer("files/file-a") as writer:
        writer.write(b"x")
    assert (tmp_path / "disk" / "storage" / "files" / "file-a").read_bytes() == b"x"


# --- folders -------------------------------------------------------------------------------------------


def test_a_folder_comes_back_as_it_was(store: Storage, adapter: Path, tmp_path: Path) -> None:
    store.put_folder("jobs/j/1/adapter", adapter)
    store.fetch_folder("jobs/j/1/adapter", tmp_path / "copy")
    assert everything_in(tmp_path / "copy") == everything_in(adapter)
    for name in everything_in(adapter):
        assert (tmp_path / "copy" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "remove"])
def test_a_damaged_folder_is_refused(store: Storage, adapter: Path, tmp_path: Path, damage: str) -> None:
    store.put_folder("jobs/j/1/adapter", adapter)
    stored = store.root / "jobs/j/1/adapter/adapter_model.safetensors"
    data = bytearray(stored.read_bytes())
    if damage == "remove":
        stored.unlink()
    else:
        if damage == "flip":
            data[1_000_000] ^= 1
        changed = {"flip": data, "truncate": data[:-1], "append": data + b"x"}[damage]
        stored.write_bytes(changed)
    with pytest.raises(StorageError, match=r"adapter_model\.safetensors"):
        store.fetch_folder("jobs/j/1/adapter", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert not list(tmp_path.glob("copy*"))


def test_a_folder_without_its_manifest_is_not_complete(store: Storage, adapter: Path, tmp_path: Path) -> None:
    store.put_folder("jobs/j/1/adapter", adapter)
    store.delete(f"jobs/j/1/adapter/{MANIFEST}")
    with pytest.raises(StorageError):
        store.fetch_folder("jobs/j/1/adapter", tmp_path / "copy")


@pytest.mark.parametrize(
    "manifest", ["", "[]", '{"files": 3}', '{"files": {"../x": {}}}', '{"files": {"a": {}}}']
)
def test_a_manifest_that_makes_no_sense_is_refused(store: Storage, tmp_path: Path, manifest: str) -> None:
    (store.root / "jobs/j").mkdir(parents=True)
    (store.root / "jobs/j" / "a").write_text("a")
    (store.root / "jobs/j" / MANIFEST).write_text(manifest)
    with pytest.raises(StorageError):
        store.fetch_folder("jobs/j", tmp_path / "copy")


def test_a_folder_stored_again_holds_nothing_old(store: Storage, adapter: Path, tmp_path: Path) -> None:
    store.put_folder("jobs/j/1/adapter", adapter)
    (adapter / "manifest.json").unlink()
    store.put_folder("jobs/j/1/adapter", adapter)
    assert "jobs/j/1/adapter/manifest.json" not in store.list("jobs/j/1/adapter")


def test_a_deleted_folder_is_gone(store: Storage, adapter: Path) -> None:
    store.put_folder("jobs/j/1/adapter", adapter)
    store.delete_folder("jobs/j/1/adapter")
    store.delete_folder("jobs/j/1/adapter")
    assert store.list("jobs") == []


# --- crashes and full disks ----------------------------------------------------------------------------


WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
from store.storage import Storage
writer = Storage(Path(sys.argv[1])).writer("files/file-a").__enter__()
writer.write(b"half")
print("writing", flush=True)
time.sleep(60)
"""


def test_a_killed_writer_leaves_a_part_that_is_removed_and_a_living_one_does_not(store: Storage) -> None:
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(store.root)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"writing\n"
        assert store.remove_part_leftovers() == 0
        assert len(everything_in(store.root)) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(everything_in(store.root)) == 1
    assert not store.exists("files/file-a")
    assert store.remove_part_leftovers() == 1
    assert everything_in(store.root) == []


def test_the_cleaner_never_takes_a_part_from_a_living_writer(store: Storage) -> None:
    stop = threading.Event()

    def clean() -> None:
        while not stop.is_set():
            store.remove_part_leftovers()

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for number in range(200):
            with store.writer(f"files/file-{number}") as writer:
                writer.write(b"x")
    finally:
        stop.set()
        cleaner.join()
    assert len(store.list("files")) == 200


def test_a_full_disk_is_said_and_leaves_nothing(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    new_part = storage._new_part

    def on_a_full_disk(incoming: Path) -> tuple[Path, BinaryIO]:
        part, file = new_part(incoming)
        file.close()
        return part, open("/dev/full", "wb")  # the kernel answers that no space is left

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_new_part", on_a_full_disk)
        with pytest.raises(StorageFull, match="No space"):
            write(store, "files/file-a", b"x" * 500_000)
        with pytest.raises(StorageFull, match="No space"):
            write(store, "files/file-a", b"small enough to be noticed at the end only")
    assert everything_in(store.root) == []
    write(store, "files/file-a", b"x")


# --- rows ----------------------------------------------------------------------------------------------


def test_files_are_listed_in_either_order_page_by_page(sessions: Sessions) -> None:
    with sessions.begin() as session:
        making.project(session)
        making.project(session, "other")
        made = [making.file(session).id for _ in range(5)]
        making.file(session, project_id="other")
        result = making.file(session, purpose="fine-tune-results").id
    with sessions() as session:
        newest = files.list_files(session, "p", limit=2)
        assert ([f.id for f in newest.data], newest.has_more) == ([result, made[4]], True)
        rest = files.list_files(session, "p", after=made[4])
        assert ([f.id for f in rest.data], rest.has_more) == (made[3::-1], False)
        oldest = files.list_files(session, "p", order="asc", limit=2, after=made[0])
        assert [f.id for f in oldest.data] == made[1:3]
        assert len(files.list_files(session, "p", purpose="fine-tune").data) == 5
        with pytest.raises(UnknownCursor):
            files.list_files(session, "other", after=made[0])


def test_a_client_that_deletes_while_it_walks_sees_every_file(sessions: Sessions) -> None:
    with sessions.begin() as session:
        making.project(session)
        made = [making.file(session).id for _ in range(5)]
    seen: list[str] = []
    while len(seen) < 5:
        with sessions.begin() as session:
            page = files.list_files(session, "p", limit=2, after=seen[-1] if seen else None)
            for file in page.data:
                files.delete_file(session, "p", file.id)
        seen += [file.id for file in page.data]
    assert seen == made[::-1]


def test_another_projects_file_is_not_found(sessions: Sessions) -> None:
    with sessions.begin() as session:
        making.project(session)
        file = making.file(session)
    with sessions() as session:
        with pytest.raises(NotFound):
            files.get_file(session, "other", file.id)
        with pytest.raises(NotFound):
            files.delete_file(session, "other", file.id)
        assert files.get_file(session, "p", file.id).id == file.id


def test_a_deleted_file_is_gone_with_its_bytes(sessions: Sessions, store: Storage) -> None:
    with sessions.begin() as session:
        making.project(session)
        file, kept = making.file(session), making.file(session)
    for one in (file, kept):
        with store.writer(files.file_key(one.id)) as writer:
            writer.write(b"x")
    with sessions.begin() as session:
        files.delete_file(session, "p", file.id)
    with sessions() as session, pytest.raises(NotFound):
        files.get_file(session, "p", file.id)
    assert files.purge_files(sessions, store) == 1
    assert files.purge_files(sessions, store) == 0
    assert store.list("files") == [files.file_key(kept.id)]


@pytest.mark.parametrize("role", ["training_file", "validation_file"])
def test_a_file_that_a_job_needs_cannot_be_deleted_until_the_job_has_ended(
    sessions: Sessions, role: str
) -> None:
    with sessions.begin() as session:
        making.project(session)
        file = making.file(session)
    job = making.job(sessions, status="validating_files", **{role: file})
    for status in ("validating_files", "queued", "running"):
        with sessions.begin() as session:
            session.scalars(select(Job)).one().status = status
        with pytest.raises(FileInUse, match=job.id), sessions.begin() as session:
            files.delete_file(session, "p", file.id)
    with sessions.begin() as session:
        session.scalars(select(Job)).one().status = "failed"
    with sessions.begin() as session:
        files.delete_file(session, "p", file.id)


def test_creating_a_job_against_deleting_its_file_ends_one_way(sessions: Sessions) -> None:
    with sessions.begin() as session:
        making.project(session)
        made = [making.file(session) for _ in range(15)]
    for file in made:
        barrier = threading.Barrier(2)
        done: list[str] = []

        def create(file: File = file, barrier: threading.Barrier = barrier, done: list[str] = done) -> None:
            barrier.wait(30)
            try:
                with sessions.begin() as session:
                    jobs.create(session, project_id="p", spec=making.SPEC, training_file=file)
                done.append("created")
            except NotFound:
                pass

        def delete(file: File = file, barrier: threading.Barrier = barrier, done: list[str] = done) -> None:
            barrier.wait(30)
            try:
                with sessions.begin() as session:
                    files.delete_file(session, "p", file.id)
                done.append("deleted")
            except FileInUse:
                pass

        pair = [threading.Thread(target=create), threading.Thread(target=delete)]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join(30)
        assert len(done) == 1


def test_an_expired_file_goes_unless_a_job_needs_it(sessions: Sessions, store: Storage) -> None:
    with sessions.begin() as session:
        making.project(session)
        free, needed, fresh = (making.file(session, expires_in=3600) for _ in range(3))
    job = making.job(sessions, training_file=needed)
    with sessions.begin() as session:
        for file in (free, needed):
            session.merge(file).expires_at = db_now() - 1
    files.purge_files(sessions, store)
    with sessions() as session:
        gone = set(session.scalars(select(File.id).where(File.deleted_at.is_not(None))))
        assert gone == {free.id}
        with pytest.raises(NotFound):
            files.get_file(session, "p", free.id)
        assert files.get_file(session, "p", fresh.id).expires_at == pytest.approx(time.time() + 3600, abs=60)
    with sessions.begin() as session:
        control.cancel(session, job)
    files.purge_files(sessions, store)
    with sessions() as session:
        assert session.scalar(select(File.deleted_at).where(File.id == needed.id)) is not None


def test_the_storage_of_the_settings_is_in_the_home(settings: Settings) -> None:
    assert storage.storage(settings).root == Path(os.path.realpath(settings.home / "storage"))
    shutil.rmtree(settings.home / "storage")
