"""The list of methods matches what a job can request, option by option."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from olora_core.specs import ADAPTER_SPECS

from .calls import create, created


def listed(client: TestClient) -> dict[str, dict[str, Any]]:
    answer = client.get("/v1/adapter_methods")
    assert answer.status_code == 200
    assert answer.json()["object"] == "list"
    return {method["id"]: method for method in answer.json()["data"]}


def test_every_method_is_listed_with_what_it_is_and_costs(client: TestClient) -> None:
    methods = listed(client)
    assert list(methods) == list(ADAPTER_SPECS)
    olora = methods["olora"]
    assert olora["object"] == "adapter_method"
    assert olora["paper"] == "arXiv 2406.01775"
    assert "QR" in olora["summary"]
    assert "rank 2r" in olora["cost"]
    assert olora["choose"].startswith("The default")
    assert [method["id"] for method in methods.values() if method["is_default"]] == ["olora"]
    for method in methods.values():
        assert all(method[part].endswith(".") for part in ("summary", "cost", "choose") if method[part])


@pytest.mark.parametrize("method", ADAPTER_SPECS)
def test_the_options_with_their_defaults_are_an_adapter_that_a_job_takes(
    client: TestClient, method: str
) -> None:
    options = listed(client)[method]["options"]["properties"]
    asked = {name: option["default"] for name, option in options.items()}
    assert asked["method"] == method
    assert all(option.get("description") for name, option in options.items() if name != "method")
    assert created(client, adapter=asked)["adapter"] == asked
    assert created(client, adapter={"method": method})["adapter"] == asked


@pytest.mark.parametrize("method", ADAPTER_SPECS)
def test_values_beyond_the_listed_bounds_are_refused(client: TestClient, method: str) -> None:
    options = listed(client)[method]["options"]["properties"]
    steps = {"minimum": -1, "exclusiveMinimum": 0, "maximum": 1, "exclusiveMaximum": 0}
    beyond = [
        (name, option[bound] + step)
        for name, option in options.items()
        for bound, step in steps.items()
        if bound in option
    ]
    assert len(beyond) >= 6
    for name, value in beyond:
        answer = create(client, training_file="file-none", adapter={"method": method, name: value})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == f"adapter.{name}"


def test_an_option_that_is_not_listed_is_refused(client: TestClient) -> None:
    assert listed(client)["lora"]["options"]["additionalProperties"] is False
    answer = create(client, training_file="file-none", adapter={"method": "lora", "gamma": 1})
    assert answer.json()["error"]["param"] == "adapter.gamma"
