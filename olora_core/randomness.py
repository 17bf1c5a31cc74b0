"""The random numbers of one run, which dropout draws from torch's global generators."""

import torch
from torch import Tensor


class Randomness:
    """A state of the global generators that belongs to one run.

    It is put in place while the run computes and taken out again, so that what a driver draws between two
    steps changes nothing, and the driver's own numbers are left alone.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.state: dict[str, Tensor] = {}
        with self:
            torch.manual_seed(seed)

    def __enter__(self) -> None:
        self._outside = self._read()
        self._write(self.state)

    def __exit__(self, *_: object) -> None:
        self.state = self._read()
        self._write(self._outside)

    def _read(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _write(self, state: dict[str, Tensor]) -> None:
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
