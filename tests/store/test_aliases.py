"""Other names for base models: which model each stands for, and what cannot be set."""

import itertools
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from olora_core.errors import ModelError
from store.aliases import base_id, check_aliases, common_name, listed_aliases
from store.errors import SettingsError
from store.settings import Settings, read_settings


def with_aliases(tmp_path: Path, text: str) -> Settings:
    return read_settings(home=tmp_path, model_aliases=text)


@pytest.mark.parametrize(
    ("aliases", "name"),
    [
        ("gpt-4o-mini*=olora-tiny", "gpt-4o-mini-2024-07-18"),
        ("gpt-4o-mini*=olora-tiny", "gpt-4o-mini"),
        ("gpt-?.5=olora-tiny", "gpt-3.5"),
        (" a = b , b=olora-tiny,", "a"),
        ("*=olora-tiny", "anything/at all"),
        ("*=olora-tiny", "olora-tiny"),
    ],
)
def test_an_alias_stands_for_its_base_model(tmp_path: Path, aliases: str, name: str) -> None:
    settings = with_aliases(tmp_path, aliases)
    check_aliases(settings)
    assert base_id(settings, name) == "olora-tiny"


def test_a_name_that_stands_for_nothing_is_refused_with_the_setting(tmp_path: Path) -> None:
    settings = with_aliases(tmp_path, "gpt-4o-mini*=olora-tiny")
    with pytest.raises(ModelError) as caught:
        base_id(settings, "gpt-4.1-mini")
    assert caught.value.param == "model"
    assert "set OLORA_MODEL_ALIASES, such as 'gpt-4.1-mini=olora-tiny'" in caught.value.message
    assert "Available: olora-tiny" in caught.value.message


def test_a_fine_tuned_model_is_no_alias(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        base_id(with_aliases(tmp_path, "*=olora-tiny"), "ft:olora-tiny:olora::AbCdEfGh")


@pytest.mark.parametrize(
    ("aliases", "problem"),
    [
        (
            "gpt-4o=no-such-model",
            "'gpt-4o' stands for a missing model. Base model 'no-such-model' is not available",
        ),
        ("a=b, b=a", "b = a = b is a circle"),
        ("a=a", "a = a is a circle"),
        ("gpt-4o*=olora-tiny, gpt-*-mini=olora-tiny", "'gpt-4o*' and 'gpt-*-mini' both match 'gpt-4o-mini'"),
        ("a=olora-tiny, a=olora-tiny", "'a' and 'a' both match 'a'"),
        ("olora-tiny=olora-tiny", "'olora-tiny' is a base model itself"),
    ],
)
def test_aliases_that_cannot_be_meant_stop_the_start(tmp_path: Path, aliases: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(problem)) as caught:
        check_aliases(with_aliases(tmp_path, aliases))
    assert caught.value.message.startswith("OLORA_MODEL_ALIASES: ")


@pytest.mark.parametrize(
    "text", ["gpt-4o", "=olora-tiny", "a=", "a=b*", "ft:a=olora-tiny", "a[bc]=olora-tiny"]
)
def test_what_is_no_pair_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="OLORA_MODEL_ALIASES"):
        with_aliases(tmp_path, text)


def test_a_list_has_the_names_and_openais_for_a_pattern(tmp_path: Path) -> None:
    assert listed_aliases(with_aliases(tmp_path, "")) == []
    settings = with_aliases(tmp_path, "gpt-4o-mini*=olora-tiny, mine=gpt-4o-mini")
    check_aliases(settings)
    assert listed_aliases(settings) == [
        (name, "olora-tiny") for name in ("mine", "gpt-4o-mini", "gpt-4o-mini-2024-07-18")
    ]


def test_patterns_have_a_common_name_exactly_when_some_name_matches_both() -> None:
    letters = "ab"
    patterns = ["".join(p) for n in range(4) for p in itertools.product("a*?", repeat=n)] + ["b", "*b", "b*"]
    names = ["".join(p) for n in range(7) for p in itertools.product(letters, repeat=n)]
    for one, other in itertools.product(patterns, repeat=2):
        found = common_name(one, other)
        if found is None:
            assert not any(fnmatchcase(name, one) and fnmatchcase(name, other) for name in names)
        else:
            assert fnmatchcase(found, one)
            assert fnmatchcase(found, other)
