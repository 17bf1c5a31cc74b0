"""A frozen base whose blocks lie in pieces on all devices of a run (FSDP2), each gathered when it is needed.

Blocks alone: embeddings, the last norm and the LM head stay whole everywhere. Adapters are put beside the
layers afterwards and know nothing of it: while a block computes, its weights are whole, and the base's bits.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..devices import Devices, is_dtensor
from ..errors import SpecError
from ..specs import TrainSpec
from .loading import Base, weight_files
from .sites import block_stacks

ROOMY = 0.6
"""Share of a device's memory that whole weights may take; the rest is for activations and the adapters."""


def is_sharded(spec: TrainSpec, folder: Path, device: str, devices: int) -> bool:
    """Whether a run shards its base. "auto": where a GPU has no room for all of it beside the rest."""
    asked = spec.hyperparameters.sharding
    if devices == 1 or asked == "none":
        return False
    if asked == "full":
        return True
    if torch.device(device).type != "cuda":
        return False
    bytes_of_weights = sum(path.stat().st_size for path in weight_files(folder))
    return bytes_of_weights > ROOMY * torch.cuda.get_device_properties(device).total_memory


def shard(base: Base, device: str, devices: Devices) -> Base:
    """Spreads the blocks of `base`, loaded on the CPU, over the run's devices; the rest goes to `device`.

    For good: a sharded base serves the processes that share it, and no other run.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if base.quantised is not None:
        raise SpecError(
            "hyperparameters.sharding: a quantised base cannot be sharded; set it to 'none'.",
            param="hyperparameters.sharding",
        )
    model, kind = base.model, torch.device(device).type
    mesh = init_device_mesh(kind, (devices.count,))
    for stack in block_stacks(model):
        for block in model.get_submodule(stack):
            _check(base, block)
            # Each block is a root of its own, and a root would stay whole after its forward pass.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.to(device)
    base.device, base.shards = torch.device(device), devices.count
    return base


def _check(base: Base, block: nn.Module) -> None:
    for module in block.modules():
        own = type(module).__module__.startswith("transformers.models.") and isinstance(module, nn.Linear)
        if own or any(not p.is_floating_point() for p in module.parameters(recurse=False)):
            raise SpecError(
                f"hyperparameters.sharding: base model '{base.name}' has layers that cannot be sharded "
                f"({type(module).__name__}); set it to 'none'.",
                param="hyperparameters.sharding",
            )


def own_part(original: Tensor, resident: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `original` that this process holds of a sharded `resident`, and what it holds; or both."""
    if not is_dtensor(resident):
        return original, resident
    mine = resident.to_local()
    rank, count = resident.device_mesh.get_local_rank(), resident.device_mesh.size()
    parts = original.chunk(count)
    return (parts[rank] if rank < len(parts) else original[:0]), mine
