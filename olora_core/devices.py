"""The processes that share one run, one for each device, and what they exchange.

Rank 0 is the main process: it alone reports to the caller, writes checkpoints and exports. The others run
the same code on the same numbers. An optimizer batch is cut into micro-batches as on one device, and these
are dealt out; adapters are replicated, and their gradients are summed in one all-reduce, after which every
process clips, calls the method's hooks and steps alike.

Why not torch's DistributedDataParallel: it hides a large model's gradient traffic behind the backward, and an
adapter's gradients are small. It also wants one forward through the wrapped model in each step: here a loss
calls decoder and head separately, a preference loss calls both twice, and a process may have no micro-batch.
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

TIMEOUT_SECONDS = 300.0
"""How long a process waits for another; less than a supervisor waits for a trainer."""
LEAVE_SECONDS = 10.0
"""How long the main process, leaving, waits for the others to notice."""


class MainProcessLeft(Exception):
    """Raised in the other processes when the main process has left the run, so that theirs ends too."""


class Devices:
    """One process on one device: every operation is the identity. See `ProcessGroup`."""

    rank = 0
    count = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Wraps the run: when the main process leaves the block, however that happens, the others do."""
        yield

    def barrier(self) -> None:
        """Waits for all processes. Raises MainProcessLeft, ProcessLost.

        Needed before an exchange wherever the main process may have been stopped since the last one.
        """
        self.barrier_any(False)

    def barrier_any(self, flag: bool) -> bool:
        """A barrier that returns whether any process passed True."""
        return flag

    def sum(self, tensor: Tensor) -> Tensor:
        """(…) → (…): the elementwise sum over the processes, the same bits in all of them."""
        return tensor

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        """Replaces every parameter's gradient by its sum over the processes.

        Returns the sum of `numbers` (n,), fp64, which travel in the same message.
        """
        return numbers

    def assign(self, token_counts: Sequence[int], *, in_step: bool = False) -> list[tuple[int, bool]]:
        """(index, counts) of the micro-batches of an optimizer batch that this process computes.

        `token_counts` has an entry for each micro-batch. With `in_step` all processes get equally many: one
        that is short repeats a micro-batch with counts=False, whose result is to be ignored.
        """
        return [(index, True) for index in range(len(token_counts))]

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors, of any shape and the same in all processes, with the main process's."""

    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, which must be picklable."""
        return value

    def check_equal(self, tensors: Iterable[Tensor]) -> None:
        """Raises TrainingError unless all processes hold the same bits, whatever the tensors' shapes."""


SINGLE = Devices()
"""A run on one device."""


class ProcessGroup(Devices):
    """This process as a member of torch's default process group. See `join`."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        try:
            yield
        except MainProcessLeft:
            return
        except ProcessLost:
            raise
        except BaseException as error:
            if self.is_main:
                self._leave()
            elif isinstance(error, OloraError) and self._main_left():
                return  # the main process met the same error and has reported it
            raise

    def barrier_any(self, flag: bool) -> bool:
        left, anywhere = self._all_reduce(torch.tensor([0, int(flag)]), "MAX").tolist()
        if left:
            raise MainProcessLeft
        return bool(anywhere)

    def _leave(self) -> None:
        """Takes part in the others' next barrier to say so. They may be far from it, or gone."""
        import torch.distributed as dist

        try:
            barrier = dist.all_reduce(torch.tensor([1, 0]), dist.ReduceOp.MAX, async_op=True)
            barrier.wait(timedelta(seconds=LEAVE_SECONDS))
        except RuntimeError:
            return

    def _main_left(self) -> bool:
        try:
            self.barrier()
        except MainProcessLeft:
            return True
        return False

    def sum(self, tensor: Tensor) -> Tensor:
        return self._all_reduce(tensor.clone(), "SUM")

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        # A parameter without a gradient in any process keeps none, as with one process: AdamW then skips it,
        # and a gradient of zeros would still apply momentum and weight decay.
        if self.barrier_any(any(p.grad is None for p in parameters)):
            present = self._all_reduce(torch.tensor([p.grad is not None for p in parameters]).int(), "MAX")
            parameters = [p for p, is_there in zip(parameters, present.tolist(), strict=True) if is_there]
        # The message is fp32 as the gradients are. An fp64 number travels as two fp32 ones (its rounded value
        # and the rest), in slots that are this process's own and 0 in all others: the reduction adds zeros to
        # them, so they arrive unchanged, and are summed in fp64 afterwards.
        slots = torch.zeros(self.count, 2, len(numbers), device=numbers.device)
        slots[self.rank, 0] = numbers
        slots[self.rank, 1] = numbers - slots[self.rank, 0]
        # One message instead of one for each tensor: an adapter has hundreds of small ones, and each
        # all-reduce costs a round trip.
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        message = self._all_reduce(torch.cat([piece.flatten() for piece in (*pieces, slots)]), "SUM")
        *sums, slots = message.split([piece.numel() for piece in (*pieces, slots)])
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return slots.view(self.count, 2, -1).double().sum(dim=(0, 1))

    def assign(self, token_counts: Sequence[int], *, in_step: bool = False) -> list[tuple[int, bool]]:
        shares = deal(token_counts, self.count)
        own = [(index, True) for index in shares[self.rank]]
        repeated = own[-1][0] if own else 0
        missing = max(map(len, shares)) - len(own) if in_step else 0
        return own + [(repeated, False)] * missing

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        import torch.distributed as dist

        self.barrier()
        with _process_lost():
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def broadcast_object(self, value: Any) -> Any:
        import torch.distributed as dist

        values = [value]
        with _process_lost():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def check_equal(self, tensors: Iterable[Tensor]) -> None:
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        digests = torch.zeros(self.count, dtype=torch.int64)
        digests[self.rank] = int.from_bytes(digest.digest()[:7], "big")  # 56 bits, so that int64 holds it
        self.barrier()
        if len(set(self.sum(digests).tolist())) > 1:
            raise TrainingError(
                "The adapters of the run's devices are no longer the same; use devices of one kind, "
                "or train on one."
            )

    def _all_reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """In place, and returned."""
        import torch.distributed as dist

        with _process_lost():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        return tensor


@contextmanager
def _process_lost() -> Iterator[None]:
    """Turns torch's error about a process that is gone or silent into ProcessLost."""
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
    rendezvous_file: Path | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[Devices]:
    """Joins the process group; leaving the block leaves the group.

    Rank and count come from the environment, as torchrun and `accelerate launch` set it, or with
    `rendezvous_file` from the arguments: a path that does not exist yet and that all processes see.

    Raises ProcessLost when the others do not come.
    """
    import torch.distributed as dist

    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    where: dict[str, Any] = {}
    if rendezvous_file is not None and rank is not None and count is not None:
        where = {"store": dist.FileStore(str(rendezvous_file), count), "rank": rank, "world_size": count}
    with _process_lost():
        # Barriers exchange numbers that the host knows: over gloo, they never wait for a GPU.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_seconds), **where
        )
    try:
        yield ProcessGroup()
    finally:
        dist.destroy_process_group()


def deal(token_counts: Sequence[int], count: int) -> list[list[int]]:
    """Balances micro-batches over `count` processes: for each, the rising indices of those it computes.

    The largest goes first, to the process with the fewest tokens so far.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(token_counts)), key=lambda i: (-token_counts[i], i)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += token_counts[index]
    return [sorted(share) for share in shares]


def is_dtensor(weight: Tensor) -> bool:
    """Whether this process holds only its rows of the weight (a DTensor, whose import takes its time)."""
    return hasattr(weight, "full_tensor")


def full_tensor(part: Tensor) -> Tensor:
    """The whole weight, out×in, from the rows that each process holds; all processes must call it at once."""
    gathered: Tensor = part.full_tensor()  # type: ignore[attr-defined]
    return gathered
