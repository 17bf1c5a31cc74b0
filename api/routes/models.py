"""Models: the base models that can be trained, and the project's own fine-tuned ones."""

from fastapi import APIRouter
from sqlalchemy.orm import Session

from olora_core.errors import ModelError
from store import aliases, bases, checkpoints, fine_tuned
from store.models import Checkpoint, Model

from ..deps import Call, CallDep
from ..errors import Forbidden, NotFound
from ..schemas.models import ModelList, ModelObject
from ..schemas.pages import Deleted
from ..submission import CHECKPOINT_MARK

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
def list_models(call: CallDep) -> ModelList:
    with call.reading() as session:
        own = [_fine_tuned(row, call) for row in fine_tuned.list_models(session, call.project_id)]
        kept = checkpoints.list_checkpoint_models(session, call.project_id)
        own += [_checkpoint(session, row, call) for row in kept]
    listed = [_base(ref) for ref in bases.base_models(call.settings)]
    listed += [
        _named(name, bases.find_base(call.settings, base))
        for name, base in aliases.listed_aliases(call.settings)
    ]
    return ModelList(data=listed + own)


@router.get("/{model:path}")
def retrieve_model(model: str, call: CallDep) -> ModelObject:
    if not model:
        raise NotFound(
            "Name a model, as in GET /v1/models/olora-tiny; GET /v1/models lists them.", param="model"
        )
    try:
        ref = bases.find_base(call.settings, aliases.base_id(call.settings, model))
        return _named(model, ref)
    except ModelError:
        with call.reading() as session:
            if CHECKPOINT_MARK in model:
                row = checkpoints.get_checkpoint_model(session, call.project_id, model)
                return _checkpoint(session, row, call)
            return _fine_tuned(fine_tuned.get_model(session, call.project_id, model), call)


@router.delete("/{model:path}")
def delete_model(model: str, call: CallDep) -> Deleted:
    """Deletes the model, its adapter and its checkpoints, or one checkpoint; the job itself stays."""
    if any(model == name for name, _ in aliases.listed_aliases(call.settings)):
        raise Forbidden(
            f"'{model}' is another name for a base model; the operator removes it from OLORA_MODEL_ALIASES.",
            param="model",
        )
    if any(ref.id == model for ref in bases.base_models(call.settings)):
        raise Forbidden(
            f"'{model}' is a base model; the operator removes it from OLORA_MODELS_DIR, from `models` in "
            "OLORA_HOME, or from OLORA_ALLOWED_HUB_MODELS.",
            param="model",
        )
    with call.writing() as session:
        if CHECKPOINT_MARK in model:
            row = checkpoints.get_checkpoint_model(session, call.project_id, model)
            fine_tuned.require_unused(session, call.project_id, model)
            checkpoints.delete_checkpoints(session, Checkpoint.id == row.id)
        else:
            fine_tuned.delete_model(session, call.project_id, model)
    call.nudge()
    return Deleted(id=model, object="model")


def _base(ref: bases.BaseModelRef) -> ModelObject:
    return ModelObject(id=ref.id, created=ref.created, owned_by="system")


def _named(name: str, ref: bases.BaseModelRef) -> ModelObject:
    """A base model under the name that was asked for: its id, or an alias."""
    return _base(ref).model_copy(update={} if ref.id == name else {"id": name, "olora": {"base": ref.id}})


def _fine_tuned(row: Model, call: Call) -> ModelObject:
    return ModelObject(id=row.id, created=int(row.created_at), owned_by=call.settings.organization)


def _checkpoint(session: Session, row: Checkpoint, call: Call) -> ModelObject:
    status, _ = checkpoints.status_of(session, row)
    return ModelObject(
        id=str(row.model),
        created=int(row.created_at),
        owned_by=call.settings.organization,
        olora={"job": row.job_id, "checkpoint": row.id, "status": status},
    )
