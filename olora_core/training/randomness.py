"""The random numbers of one run, drawn by dropout from torch's global generators."""

import torch
from torch import Tensor

from ..seeds import seed_of


class Randomness:
    """Seeds torch's generators for each micro-batch from (seed, step, index in the optimizer batch).

    So the numbers depend neither on earlier draws, and a checkpoint holds no generator's state, nor on the
    device that computes the micro-batch. Entering saves the caller's generator states and leaving restores
    them, so that draws of the caller between two steps change nothing and are not changed.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device

    def begin(self, step: int, position: int) -> None:
        """Seeds the generators for a micro-batch. Only inside `with`."""
        torch.manual_seed(seed_of(f"draws/{self.seed}/{step}/{position}"))

    def __enter__(self) -> None:
        self._outside = self._read()

    def __exit__(self, *_: object) -> None:
        self._write(self._outside)

    def _read(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _write(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
