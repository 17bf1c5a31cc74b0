"""The base model that stays loaded from one job to the next."""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olora_core.errors import SpecError
from olora_core.specs import TrainSpec

from ..protocol import Order

if TYPE_CHECKING:
    from olora_core.bases.loading import Base
    from olora_core.devices import Devices


class WarmBase:
    """The last job's base model, kept for a job that loads the same files in the same way."""

    def __init__(self) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._key: tuple[Any, ...] | None = None
        self._base: Base | None = None

    def get(self, folder: Path, spec: TrainSpec, loading: Callable[[], None]) -> "Base":
        """The spec's base model. Calls `loading` before it loads one.

        Raises ModelError when the folder cannot be loaded.
        """
        from olora_core.bases.loading import load_base
        from olora_core.bases.precision import compute_dtype

        dtype = compute_dtype(spec, folder, self.device)
        quantization = spec.hyperparameters.quantization
        key = (spec.model, str(folder.resolve()), _files_of(folder), dtype, quantization)
        if self._base is None or self._key != key:
            self.drop()
            loading()
            self._base = load_base(
                folder, name=spec.model, device=self.device, dtype=dtype, quantization=quantization
            )
            self._key = key
        return self._base

    def drop(self) -> None:
        self._base = self._key = None
        free_memory()


def shared_base(order: Order, spec: TrainSpec, device: str, devices: "Devices") -> "Base":
    """The order's base for one of several ranks, in the resolved dtype and sharding of `spec`."""
    from olora_core.bases.loading import load_base
    from olora_core.bases.precision import DTYPES
    from olora_core.bases.sharding import shard

    asked = spec.hyperparameters
    loaded = partial(
        load_base,
        Path(order.base),
        name=spec.model,
        dtype=DTYPES[asked.dtype],
        quantization=asked.quantization,
    )
    if asked.sharding == "full":
        return shard(loaded(device="cpu"), device, devices)
    return loaded(device=device)


def _files_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files: enough to notice that one was replaced."""
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def check_devices(devices: int) -> None:
    """Raises SpecError when this process sees GPUs, but fewer than `devices`."""
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        raise SpecError(
            f"olora.devices = {devices}, and the worker that took the job has {torch.cuda.device_count()}; "
            "ask for fewer, or give each worker more GPUs (OLORA_DEVICES_PER_WORKER).",
            param="olora.devices",
        )


def free_memory() -> None:
    """Returns unused memory to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
