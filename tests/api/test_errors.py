"""Errors and how a client reacts to them: its own retry rules are the reference."""

import pytest
from openai import OpenAI

from api.errors import as_api_error
from olora_core.errors import ModelError, OloraError, SpecError
from store import errors as store_errors

ERRORS = (
    (SpecError("m", param="p"), 400, False),
    (ModelError("m", param="p"), 400, False),
    (store_errors.NotFound("m", param="p"), 404, False),
    (store_errors.JobStateError("m", param="p"), 400, False),
    (store_errors.FileInUse("m", param="p"), 400, False),
    (store_errors.RequestMismatch("m", param="p"), 400, False),
    (store_errors.RequestPending("m", param="p"), 409, True),
    (store_errors.TooLarge("m", param="p"), 413, False),
    (store_errors.StorageFull("m", param="p"), 507, False),
    (store_errors.StorageDamaged("m", param="p"), 500, True),
)


@pytest.mark.parametrize(("error", "status", "tried_again"), ERRORS)
def test_a_client_tries_again_when_that_can_help(error: OloraError, status: int, tried_again: bool) -> None:
    answer = as_api_error(error)
    assert answer is not None
    assert answer.status == status
    body = answer.body()["error"]
    assert (body["message"], body["param"], body["code"]) == ("m", "p", error.code)
    assert (body["type"] == "server_error") == (status >= 500)

    import httpx2

    response = httpx2.Response(status, headers=dict(answer.response().headers))
    with OpenAI(api_key="k", base_url="http://127.0.0.1:1") as client:
        assert client._should_retry(response) == tried_again


def test_what_nobody_expects_is_nobodys_sentence() -> None:
    assert as_api_error(KeyError("x")) is None
