"""Adapter methods: what `adapter.method` may be, and the options of each. The same for every project."""

from fastapi import APIRouter

from olora_core.specs import ADAPTER_SPECS, DEFAULT_METHOD, AdapterSpec

from ..deps import CallDep
from ..schemas.adapter_methods import AdapterMethodList, AdapterMethodObject

router = APIRouter(prefix="/v1/adapter_methods", tags=["adapter methods"])


@router.get("")
def list_adapter_methods(call: CallDep) -> AdapterMethodList:
    return AdapterMethodList(data=[_method(name, spec) for name, spec in ADAPTER_SPECS.items()])


def _method(name: str, spec: type[AdapterSpec]) -> AdapterMethodObject:
    return AdapterMethodObject(
        id=name,
        is_default=name == DEFAULT_METHOD,
        summary=spec.summary,
        paper=spec.paper,
        cost=spec.cost,
        choose=spec.choose,
        options=spec.options(),
    )
