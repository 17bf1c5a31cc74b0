"""Base models: which are available, and why a folder cannot be used."""

import os
import shutil
from pathlib import Path

import pytest

from olora_core.errors import ModelError
from store.bases import SHIPPED_FOLDER, base_models, fetch_base, find_base
from store.settings import Settings, read_settings


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    for name in ("good", "no-weights", "no-config", "pickled", ".hidden"):
        (folder / name).mkdir(parents=True)
    for name in ("good", "no-weights", "pickled", ".hidden"):
        (folder / name / "config.json").write_text("{}")
    for name in ("good", "no-config", ".hidden"):
        (folder / name / "model.safetensors").write_bytes(b"")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (folder / "notes.txt").write_text("not a folder")
    return folder


def settings_with(tmp_path: Path, **values: object) -> Settings:
    return read_settings(home=tmp_path / "home", **values)


def test_the_shipped_model_is_always_there(tmp_path: Path) -> None:
    settings = settings_with(tmp_path)
    assert [ref.id for ref in base_models(settings)] == ["olora-tiny"]
    ref = find_base(settings, "olora-tiny")
    assert fetch_base(ref, settings) == SHIPPED_FOLDER
    assert (SHIPPED_FOLDER / "model.safetensors").is_file()


def test_each_usable_folder_is_a_base_model(tmp_path: Path, models_dir: Path) -> None:
    settings = settings_with(tmp_path, models_dir=models_dir)
    assert [ref.id for ref in base_models(settings)] == ["olora-tiny", "good"]
    assert fetch_base(find_base(settings, "good"), settings) == models_dir / "good"


def test_models_added_to_the_home_are_bases_after_the_operators(tmp_path: Path, models_dir: Path) -> None:
    for name in ("good", "added", "no-weights-either"):
        shutil.copytree(models_dir / "good", tmp_path / "home" / "models" / name)
    (tmp_path / "home" / "models" / "no-weights-either" / "model.safetensors").unlink()
    (tmp_path / "home" / "models" / ".adding").mkdir()
    settings = settings_with(tmp_path, models_dir=models_dir)
    found = {ref.id: (ref.kind, ref.folder) for ref in base_models(settings)}
    assert found == {
        "olora-tiny": ("shipped", SHIPPED_FOLDER),
        "good": ("folder", models_dir / "good"),
        "added": ("added", tmp_path / "home" / "models" / "added"),
    }
    with pytest.raises(ModelError, match="cannot be used"):
        find_base(settings, "no-weights-either")


@pytest.mark.parametrize("name", ["with space & ü", "日本語", "-dash", "a+b (2)", "a" * 255, "%2e%2e", "ft"])
def test_a_folder_is_a_base_model_under_its_own_name(tmp_path: Path, models_dir: Path, name: str) -> None:
    shutil.copytree(models_dir / "good", models_dir / name)
    settings = settings_with(tmp_path, models_dir=models_dir)
    assert name in [ref.id for ref in base_models(settings)]
    assert fetch_base(find_base(settings, name), settings) == models_dir / name
    (models_dir / name / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be used"):
        find_base(settings, name)


@pytest.mark.parametrize("name", [".git", "ft:olora-tiny:olora::12345678", "two\nlines", "byte\udcff"])
def test_a_folder_whose_name_is_no_id_is_passed_over(tmp_path: Path, models_dir: Path, name: str) -> None:
    shutil.copytree(models_dir / "good", models_dir / name)
    settings = settings_with(tmp_path, models_dir=models_dir)
    assert [ref.id for ref in base_models(settings)] == ["olora-tiny", "good"]
    with pytest.raises(ModelError, match="not available"):
        find_base(settings, name)


def test_a_folder_that_may_not_be_read_does_no_harm(
    tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example `lost+found`, if OLORA_MODELS_DIR is a separate disk."""
    (models_dir / "lost+found").mkdir()
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "lost+found" and may(path, mode))
    settings = settings_with(tmp_path, models_dir=models_dir)
    assert [ref.id for ref in base_models(settings)] == ["olora-tiny", "good"]
    with pytest.raises(ModelError, match="cannot be read by the service"):
        find_base(settings, "lost+found")


@pytest.mark.parametrize(
    ("name", "says"),
    [("no-weights", "safetensors"), ("pickled", "safe_serialization"), ("no-config", "config.json")],
)
def test_a_folder_that_cannot_be_used_is_named_with_its_remedy(
    tmp_path: Path, models_dir: Path, name: str, says: str
) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        find_base(settings_with(tmp_path, models_dir=models_dir), name)
    assert (caught.value.code, caught.value.param) == ("model_not_available", "model")
    assert name in caught.value.message


@pytest.mark.parametrize(
    "model_id",
    [
        "gpt-4o",
        "../models/good",
        "/etc",
        ".hidden",
        "",
        "good/../good",
        "a" * 5000,
        "Qwen/Qwen3-0.6B",
        "a/b/c",
    ],
)
def test_an_unknown_id_is_refused_and_the_known_ones_are_named(
    tmp_path: Path, models_dir: Path, model_id: str
) -> None:
    with pytest.raises(ModelError, match="olora-tiny, good") as caught:
        find_base(settings_with(tmp_path, models_dir=models_dir), model_id)
    assert len(caught.value.message) < 700


def test_the_nearest_id_is_suggested(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean 'olora-tiny'"):
        find_base(settings_with(tmp_path), "olora-tyni")


def test_hub_models_are_those_on_the_operators_list(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, allowed_hub_models="Qwen/*, gpt2,meta-llama/Llama-3.2-1B")
    assert find_base(settings, "Qwen/Qwen3-0.6B").kind == "hub"
    assert find_base(settings, "gpt2").folder is None
    for refused in ("meta-llama/Llama-3.2-3B", "qwen/Qwen3-0.6B", "Qwen/../../etc", "Qwen/a/b", "gpt2-xl"):
        with pytest.raises(ModelError, match="not available"):
            find_base(settings, refused)
    listed = [ref.id for ref in base_models(settings)]
    assert listed == ["olora-tiny", "gpt2", "meta-llama/Llama-3.2-1B"]


def test_a_hub_that_cannot_be_reached_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = settings_with(tmp_path, allowed_hub_models="nobody/*")
    with pytest.raises(ModelError, match="'nobody/nothing' could not be fetched"):
        fetch_base(find_base(settings, "nobody/nothing"), settings)


def test_a_folder_of_the_operator_may_replace_nothing_shipped(tmp_path: Path, models_dir: Path) -> None:
    shutil.copytree(models_dir / "good", models_dir / "olora-tiny")
    settings = settings_with(tmp_path, models_dir=models_dir)
    ids = [ref.id for ref in base_models(settings)]
    assert sorted(ids) == ["good", "olora-tiny"]
    assert find_base(settings, "olora-tiny").folder == SHIPPED_FOLDER
