"""A frozen base whose blocks are sharded over all devices of a run (FSDP2) and gathered one at a time.

Only the blocks are sharded: every device has the embeddings, the last norm and the LM head in full. Adapters
are attached afterwards and need not know: while a block computes, its weights are whole, bit for bit.
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
"""Share of a device's memory for unsharded weights; the rest is left to activations and adapters."""


def is_sharded(spec: TrainSpec, folder: Path, device: str, devices: int) -> bool:
    """Whether a run shards its base; "auto": only if the weights exceed ROOMY of a GPU's memory."""
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
    """Shards the blocks of `base`, loaded on the CPU, over the run's devices; the rest goes to `device`.

    This cannot be undone. Raises SpecError for a base that cannot be sharded.
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
            # Every block is an FSDP root, and a root stays gathered after its forward unless told otherwise.
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
    """The rows (local, …) of `original` that this process holds of `resident`, and those rows of `resident`.

    Both unchanged if `resident` is not sharded.
    """
    if not is_dtensor(resident):
        return original, resident
    mine = resident.to_local()
    rank, count = resident.device_mesh.get_local_rank(), resident.device_mesh.size()
    parts = original.chunk(count)
    return (parts[rank] if rank < len(parts) else original[:0]), mine
