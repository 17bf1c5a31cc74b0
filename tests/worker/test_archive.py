"""The adapter's zip: the same files give the same bytes."""

import os
import zipfile
from pathlib import Path

from worker.supervisor.archive import pack


def _folder(path: Path, *, reverse: bool) -> Path:
    contents = {
        "adapter_config.json": b"{}" * 500,
        "adapter_model.safetensors": bytes(2000),
        "native/a.safetensors": b"n",
    }
    for name, content in sorted(contents.items(), reverse=reverse):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_the_archive_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    first, second = _folder(tmp_path / "a", reverse=False), _folder(tmp_path / "b", reverse=True)
    os.utime(second / "adapter_config.json", (1e9, 1e9))
    (second / "adapter_config.json").chmod(0o600)
    pack(first, tmp_path / "a.zip")
    pack(second, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_the_adapter_stands_at_the_top(tmp_path: Path) -> None:
    pack(_folder(tmp_path / "a", reverse=False), tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "native/a.safetensors",
        ]
        assert archive.read("adapter_config.json") == b"{}" * 500
