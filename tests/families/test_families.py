"""Every causal family that transformers maps, by the trial of a tiny model: see `trial`.

`make test` has a tenth of them, another one each day; `make test-families` all.
"""

import os
from datetime import date

import pytest

from tests.families.configs import KINDS
from tests.families.exceptions import EXCEPTIONS
from tests.families.table import PAGE, results, table, written
from tests.families.trials import trial

TENTH = date.today().timetuple().tm_yday % 10
EVERY = os.environ.get("OLORA_TEST_FAMILIES") == "all"
TODAYS = KINDS if EVERY else KINDS[TENTH::10]


@pytest.mark.parametrize(
    "kind", TODAYS, ids=[kind if EVERY else f"{kind}-of-tenth-{TENTH}" for kind in TODAYS]
)
def test_a_family_is_trained_and_loaded_by_peft_or_is_an_exception(kind: str) -> None:
    facts = trial(kind)
    if kind in EXCEPTIONS:
        assert facts["outcome"] != "trained", "it trains: take it out of EXCEPTIONS, and write the table anew"
        assert EXCEPTIONS[kind].says in facts["reason"]
    else:
        assert facts == results().get(kind), "write the table anew: python -m tests.families.table " + kind


def test_every_family_of_transformers_has_a_stored_result() -> None:
    stored = results()
    assert set(stored) == set(KINDS), "write the table anew: python -m tests.families.table"
    assert {kind for kind, facts in stored.items() if facts["outcome"] != "trained"} == set(EXCEPTIONS)


def test_the_pages_table_is_that_of_the_stored_results() -> None:
    assert written(PAGE.read_text(encoding="utf-8")) == table(results())
