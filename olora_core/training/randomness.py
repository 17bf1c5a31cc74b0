"""The random numbers of one run, which dropout draws from torch's global generators."""

import torch
from torch import Tensor

from ..seeds import seed_of


class Randomness:
    """Makes each micro-batch's numbers a function of (seed, step, its place in the optimizer batch).

    So they depend neither on what was drawn before, hence a checkpoint holds no state of a generator, nor on
    which of several devices computes the micro-batch. What a driver draws between two steps changes nothing,
    and the driver's own numbers are left alone.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.device = device

    def begin(self, step: int, position: int) -> None:
        """From here on, the numbers of this micro-batch. Only inside `with`."""
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
