"""The processes that share one run, one for each device, and the few things they say to each other.

The first process leads: it alone talks to whoever drives the run, writes checkpoints and exports. The others
follow: they run the same code on the same numbers. Each optimizer batch is cut into micro-batches as ever and
these are dealt out; adapters are replicated, and their gradients are summed in one message, after which every
process clips, calls the method's hooks and steps alike.

torch's own wrapper (DistributedDataParallel) hides a large model's gradients behind its backward pass. An
adapter's are small. And it wants one forward through the wrapped model a step: here a loss calls decoder and
head by themselves, a preference's loss twice, and a process may have no micro-batch at all.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OloraError, ProcessLost, TrainingError

PATIENCE_SECONDS = 300.0
"""How long one process waits for another; less than a supervisor waits for a trainer."""
LEAVE_SECONDS = 10.0


class LeaderLeft(Exception):
    """To those who follow: the leader's run was left, so theirs is over too."""


class Devices:
    """One process on one device: everything is its own, and nothing is said."""

    rank = 0
    count = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside is the run: those who follow leave it when the leader does."""
        yield

    def meet(self, unusual: bool = False) -> bool:
        """Waits for all; returns whether anything is unusual for any. Raises LeaderLeft, ProcessLost.

        Stands before a message wherever the leader may have been stopped since the last one.
        """
        return unusual

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, the same bits for all."""
        return tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        """Replaces every gradient by its sum over the processes; returns the sum of `numbers`, (n,) fp64."""
        return numbers

    def mine(self, sizes: Sequence[int], *, in_step: bool = False) -> list[tuple[int, bool]]:
        """Which of an optimizer batch's micro-batches, of so many tokens, are computed here, and whether they
        count. With `in_step` all processes have equally many, for which some repeat one that does not count.
        """
        return [(position, True) for position in range(len(sizes))]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives everybody the leader's values, in place."""

    def agreed(self, value: Any) -> Any:
        """The leader's value; JSON-like."""
        return value

    def check_equal(self, tensors: Iterable[Tensor]) -> None:
        """Raises TrainingError when the processes do not hold the same bits."""


ALONE = Devices()


class SeveralDevices(Devices):
    """A member of torch's default process group. See `join`."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    @contextmanager
    def sharing(self) -> Iterator[None]:
        try:
            yield
        except LeaderLeft:
            return
        except ProcessLost:
            raise
        except BaseException as error:
            if self.leads:
                self._leave()
            elif isinstance(error, OloraError) and self._leader_is_gone():
                return  # the leader met the same trouble, and has told it
            raise

    def meet(self, unusual: bool = False) -> bool:
        left, somewhere = self._reduced(torch.tensor([0, int(unusual)]), "MAX").tolist()
        if left:
            raise LeaderLeft
        return bool(somewhere)

    def _leave(self) -> None:
        """Takes part in the others' next meeting, to tell them. They may be far from it, or gone."""
        import torch.distributed as dist

        try:
            meeting = dist.all_reduce(torch.tensor([1, 0]), dist.ReduceOp.MAX, async_op=True)
            meeting.wait(timedelta(seconds=LEAVE_SECONDS))
        except RuntimeError:
            return

    def _leader_is_gone(self) -> bool:
        try:
            self.meet()
        except LeaderLeft:
            return True
        return False

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor.clone(), "SUM")

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        # What no process has a gradient of keeps none, as with one process: the optimizer passes it over.
        if self.meet(unusual=any(p.grad is None for p in parameters)):
            present = self._reduced(torch.tensor([p.grad is not None for p in parameters]).int(), "MAX")
            parameters = [p for p, is_there in zip(parameters, present.tolist(), strict=True) if is_there]
        # fp64 travels as two fp32 numbers, in places of each process's own: the sum only carries them.
        places = torch.zeros(self.count, 2, len(numbers), device=numbers.device)
        places[self.rank, 0] = numbers
        places[self.rank, 1] = numbers - places[self.rank, 0]
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        message = self._reduced(torch.cat([piece.flatten() for piece in (*pieces, places)]), "SUM")
        *sums, places = message.split([piece.numel() for piece in (*pieces, places)])
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return places.view(self.count, 2, -1).double().sum(dim=(0, 1))

    def mine(self, sizes: Sequence[int], *, in_step: bool = False) -> list[tuple[int, bool]]:
        shares = deal(sizes, self.count)
        own = [(position, True) for position in shares[self.rank]]
        repeated = own[-1][0] if own else 0
        missing = max(map(len, shares)) - len(own) if in_step else 0
        return own + [(repeated, False)] * missing

    def share(self, tensors: Iterable[Tensor]) -> None:
        import torch.distributed as dist

        self.meet()
        with _losing():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def agreed(self, value: Any) -> Any:
        import torch.distributed as dist

        values = [value]
        with _losing():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def check_equal(self, tensors: Iterable[Tensor]) -> None:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        mine = torch.zeros(self.count, dtype=torch.int64)
        mine[self.rank] = int.from_bytes(digest.digest()[:7], "big")
        self.meet()
        if len(set(self.sum(mine).tolist())) > 1:
            raise TrainingError(
                "The adapters of the run's devices are no longer the same; use devices of one kind, "
                "or train on one."
            )

    def _reduced(self, tensor: Tensor, how: str) -> Tensor:
        import torch.distributed as dist

        with _losing():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
        return tensor


@contextmanager
def _losing() -> Iterator[None]:
    """What torch says when another process is gone or silent, as our own error."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise ProcessLost(
            "Another process of this run ended or no longer answers, so the run cannot go on; "
            f"it can be resumed from its last checkpoint. ({lines[0][:200] if lines else error!r})"
        ) from error


@contextmanager
def join(
    device: str,
    *,
    rank: int | None = None,
    count: int | None = None,
    meeting_file: Path | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[Devices]:
    """Joins the others; inside, they share what they do.

    Without arguments, what torchrun and `accelerate launch` put into the environment says who they are. With
    `meeting_file`, a path that does not exist yet and that all of them see, they find each other there.

    Raises ProcessLost when the others do not come.
    """
    import torch.distributed as dist

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    where: dict[str, Any] = {}
    if meeting_file is not None and rank is not None and count is not None:
        where = {"store": dist.FileStore(str(meeting_file), count), "rank": rank, "world_size": count}
    with _losing():
        # The meetings are about numbers that the host knows: they never wait for a GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=patience_seconds), **where
        )
    try:
        yield SeveralDevices()
    finally:
        dist.destroy_process_group()


def deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Who computes which micro-batch: for each of `count` processes, positions in `sizes` (tokens), rising.

    The largest goes first, to whoever has least so far.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for position in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        shares[least].append(position)
        loads[least] += sizes[position]
    return [sorted(share) for share in shares]


def is_part(weight: Tensor) -> bool:
    """Whether this process holds only its rows of the weight (a DTensor, whose import takes its time)."""
    return hasattr(weight, "full_tensor")


def whole(part: Tensor) -> Tensor:
    """The whole weight, for which every process must ask at once."""
    gathered: Tensor = part.full_tensor()  # type: ignore[attr-defined]
    return gathered
