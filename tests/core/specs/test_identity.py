"""The text by which checkpoints know their run: that of earlier versions, whatever is the default now."""

import json

import pytest

from olora_core.specs import ADAPTER_SPECS, RunFacts, read_spec, resolve
from olora_core.specs.identity import FORMER_DEFAULTS, identity_text


def resolved(adapter, **options):
    return resolve(read_spec(model="m", adapter=adapter, **options), RunFacts(100, 192, 256))[0]


@pytest.mark.parametrize("method", sorted(ADAPTER_SPECS.keys() - FORMER_DEFAULTS.keys()))
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"export_rank": 4}], ids=str)
def test_it_is_the_spec_without_its_defaults(method, options) -> None:
    spec = resolved({"method": method, **options}, seed=3)
    assert identity_text(spec) == spec.model_dump_json(exclude_defaults=True)


def test_a_default_that_has_changed_leaves_it_as_it_was() -> None:
    """Both as the version wrote them in which OLoRA's default rank was 32."""
    as_by_default, at_rank_8 = (json.loads(identity_text(resolved({"rank": rank}))) for rank in (32, 8))
    assert "adapter" not in as_by_default
    assert at_rank_8["adapter"] == {"rank": 8}
    assert json.loads(identity_text(resolved({"rank": 32, "dropout": 0.1})))["adapter"] == {"dropout": 0.1}
