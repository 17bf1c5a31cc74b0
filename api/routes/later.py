"""Routes of OpenAI's API that are not available yet; each says so with a 404."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter

from ..errors import NotFound

NOT_YET = (
    (
        "Uploads in parts",
        "send the whole file to POST /v1/files",
        (
            ("POST", "/uploads"),
            ("POST", "/uploads/{upload_id}/parts"),
            ("POST", "/uploads/{upload_id}/complete"),
            ("POST", "/uploads/{upload_id}/cancel"),
        ),
    ),
    (
        "Sharing checkpoints with other projects",
        "share the job's adapter file",
        (
            ("POST", "/fine_tuning/checkpoints/{model:path}/permissions"),
            ("GET", "/fine_tuning/checkpoints/{model:path}/permissions"),
            ("DELETE", "/fine_tuning/checkpoints/{model:path}/permissions/{permission_id}"),
        ),
    ),
    (
        "Graders",
        "evaluate the downloaded adapter",
        (
            ("POST", "/fine_tuning/alpha/graders/validate"),
            ("POST", "/fine_tuning/alpha/graders/run"),
        ),
    ),
    (
        "Webhooks",
        "follow GET /v1/fine_tuning/jobs/{id}/events?stream=true",
        (
            ("GET", "/webhook_endpoints"),
            ("POST", "/webhook_endpoints"),
            ("GET", "/webhook_endpoints/{endpoint_id}"),
            ("POST", "/webhook_endpoints/{endpoint_id}"),
            ("DELETE", "/webhook_endpoints/{endpoint_id}"),
            ("POST", "/webhook_endpoints/{endpoint_id}/rotate_secret"),
            ("POST", "/webhook_endpoints/{endpoint_id}/test"),
            ("GET", "/webhook_event_types"),
        ),
    ),
)

router = APIRouter(prefix="/v1", include_in_schema=False)


def _refusal(what: str, instead: str) -> Callable[[], Awaitable[None]]:
    async def refuse() -> None:
        raise NotFound(f"{what}: not available yet; {instead}.", code="not_available_yet")

    return refuse


for _what, _instead, _addresses in NOT_YET:
    for _method, _path in _addresses:
        router.add_api_route(_path, _refusal(_what, _instead), methods=[_method])
