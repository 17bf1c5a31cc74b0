"""The process that trains: one job or comparison after another, on a base model that stays loaded.

It has no database and no network. It ends when its supervisor does, and ends itself when the lease of the
job at hand was not renewed in time, for then another worker may already have that job.
"""

import argparse
import dataclasses
import errno
import gc
import json
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from olora_core.errors import OloraError, ProcessLost, SpecError
from olora_core.progress import (
    Compared,
    ComparedStep,
    ComparisonProgress,
    Finished,
    Phase,
    Progress,
    Saved,
    Step,
)
from olora_core.specs import ComparisonSpec, TrainSpec

from .lineage import die_with_parent
from .peers import Peers
from .protocol import FENCED, Order, Wish, claim_descriptors

if TYPE_CHECKING:
    from olora_core.bases.loading import Base
    from olora_core.devices import Devices

Said = Progress | ComparisonProgress
Work = Generator[Said, str | None, None]

logger = logging.getLogger("olora.trainer")
WATCH_SECONDS = 0.1
LAST_WORDS_SECONDS = 5.0
"""How long a peer that was lost has to say why, which it knows better."""


class Channel:
    """The supervisor's end of the line: messages out, and a thread that takes messages in."""

    def __init__(self) -> None:
        self._in, self._out = claim_descriptors()
        self.orders: queue.Queue[Order] = queue.Queue()
        self._turn = threading.Lock()
        self._run: str | None = None
        self._deadline: float | None = None
        self._wish: Wish | None = None
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def say(self, **message: Any) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()

    def end(self, run: str) -> None:
        """The job at hand is done with: its lease is nobody's concern any more."""
        with self._turn:
            if self._run == run:
                self._run = self._deadline = None

    def wish(self) -> Wish | None:
        """What the supervisor wants of the job at hand; checks its lease on the way."""
        self._fence()
        return self._wish

    def _listen(self) -> None:
        for line in self._in:
            self._hear(json.loads(line))
        # The supervisor closed the line or is gone; whatever is being done is nobody's any more.
        os._exit(0)

    def _hear(self, message: dict[str, Any]) -> None:
        with self._turn:
            if "job" in message:
                order = Order(**message["job"])
                self._run, self._deadline, self._wish = order.run, order.deadline, None
                self.orders.put(order)
            elif "lease" in message and message["lease"]["run"] == self._run:
                self._deadline = message["lease"]["deadline"]
            elif "wish" in message and message["wish"]["run"] == self._run:
                self._wish = message["wish"]["what"]

    def _watch(self) -> None:
        """For steps longer than the lease: the check between steps would come too late."""
        while True:
            time.sleep(WATCH_SECONDS)
            self._fence()

    def _fence(self) -> None:
        deadline = self._deadline
        if deadline is not None and time.monotonic() > deadline:
            os.write(2, b"The lease was not renewed in time; the trainer stops.\n")
            os._exit(FENCED)


class WarmBase:
    """The base model of the last job, kept for the next one that wants the same files held alike."""

    def __init__(self) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._key: tuple[Any, ...] | None = None
        self._base: Base | None = None

    def get(self, folder: Path, spec: TrainSpec, loading: Callable[[], None]) -> "Base":
        """The base that the spec is trained on; calls `loading` when it must be loaded.

        Raises ModelError when the folder cannot be.
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


def _files_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files: enough to see that they were exchanged."""
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def check_devices(devices: int) -> None:
    """Raises SpecError when a machine with GPUs has not so many for this process."""
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        raise SpecError(
            f"olora.devices = {devices}, and the worker that took the job has {torch.cuda.device_count()}; "
            "ask for fewer, or give each worker more GPUs (OLORA_DEVICES_PER_WORKER).",
            param="olora.devices",
        )


def free_memory() -> None:
    """Gives back what the last job used."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Trainer:
    """Takes one order after another, until the supervisor closes the line."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.base = WarmBase()

    def serve(self) -> NoReturn:
        import olora_core.training.train  # noqa: F401  # while the supervisor fetches the files

        gc.freeze()  # the libraries' objects stay, and are many: `free_memory` need not look at them again
        self.channel.say(ready={"pid": os.getpid(), "device": _device_name()})
        while True:
            order = self.channel.orders.get()
            self.channel.say(accepted={"run": order.run})
            self._attempt(order)
            self.channel.end(order.run)
            free_memory()

    def _attempt(self, order: Order) -> None:
        """Runs one order to its last word. Ends the process when its state can no longer be trusted."""
        try:
            if order.kind == "comparison":
                self._compare(order)
            else:
                self._train(order)
        except ProcessLost as error:
            self._lost({"crashed": {"message": error.message}})
        except OloraError as error:
            self.channel.say(failed={"code": error.code, "message": error.message, "param": error.param})
        except Exception as error:
            logger.exception("The attempt %s crashed.", order.run)
            self.channel.say(crashed={"message": sentence_of(error)})
            leave(1)

    def _lost(self, message: dict[str, Any]) -> None:
        """A peer is gone, and this process with it: it may wait for that one in the midst of a step."""
        self.channel.say(**message)
        leave(1)

    def _train(self, order: Order) -> None:
        from olora_core.devices import ALONE

        spec = TrainSpec.model_validate(order.spec)
        if order.devices > 1:
            self._train_together(order, spec)
        else:
            self._train_on(order, spec, self._warm_base(order, spec), ALONE)

    def _warm_base(self, order: Order, spec: TrainSpec) -> "Base":
        return self.base.get(Path(order.base), spec, loading=lambda: self._tell(Phase("loading", 0, 1)))

    def _train_together(self, order: Order, spec: TrainSpec) -> None:
        """As the first of several processes, each on its own device; on CPUs they share the threads."""
        import torch

        from olora_core.bases.precision import compute_dtype
        from olora_core.bases.sharding import is_sharded
        from olora_core.devices import join

        from .peer import shared_base

        check_devices(order.devices)
        # They talk over loopback alone.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        folder, threads = Path(order.base), torch.get_num_threads()
        device = "cuda:0" if self.base.device == "cuda" else self.base.device
        dtype = str(compute_dtype(spec, folder, device)).removeprefix("torch.")
        sharding = "full" if is_sharded(spec, folder, device, order.devices) else "none"
        decided = {"dtype": dtype, "sharding": sharding}
        plan = spec.model_copy(update={"hyperparameters": spec.hyperparameters.model_copy(update=decided)})
        share = max(1, threads // order.devices)
        torch.set_num_threads(share)
        try:
            with (
                Peers(order, plan, threads=share, on_loss=self._lost) as peers,
                join(device, rank=0, count=order.devices, meeting_file=peers.meeting_file) as devices,
            ):
                if sharding == "full":
                    self.base.drop()
                    self._tell(Phase("loading", 0, 1))
                    base = shared_base(order, plan, device, devices)
                else:
                    base = self._warm_base(order, plan)
                try:
                    self._train_on(order, spec, base, devices)
                except ProcessLost:
                    time.sleep(LAST_WORDS_SECONDS)
                    raise
                finally:
                    peers.finish()  # before the line to them is taken down
        finally:
            torch.set_num_threads(threads)

    def _train_on(self, order: Order, spec: TrainSpec, base: "Base", devices: "Devices") -> None:
        from olora_core.training.train import train

        run = train(
            spec,
            base,
            Path(order.training),
            Path(order.validation) if order.validation else None,
            Path(order.folder),
            resume=Path(order.resume) if order.resume else None,
            checkpoint_seconds=order.checkpoint_seconds,
            cache=Path(order.tokens) if order.tokens else None,
            devices=devices,
        )
        self._drive(run)

    def _compare(self, order: Order) -> None:
        """All runs of a comparison are on one base."""
        from olora_core.comparison.compare import compare

        assert order.validation is not None
        spec = ComparisonSpec.model_validate(order.spec)
        run = compare(
            spec,
            self._warm_base(order, spec.training),
            Path(order.training),
            Path(order.validation),
            Path(order.folder),
            resume=Path(order.resume) if order.resume else None,
            checkpoint_seconds=order.checkpoint_seconds,
            cache=Path(order.tokens) if order.tokens else None,
        )
        self._drive(run)

    def _drive(self, run: Work) -> None:
        stepped = False
        with closing(run):
            for progress in run:
                self._tell(progress)
                stepped = stepped or isinstance(progress, Step | ComparedStep)
                wish = self.channel.wish()
                if wish is not None and self._stops(run, progress, wish, stepped):
                    self.channel.say(stopped={"wish": wish})
                    return

    def _stops(self, run: Work, progress: Said, wish: Wish, stepped: bool) -> bool:
        """Whether the job can be left here: a release does not throw away what the last steps learned."""
        match progress:
            case Finished() | Compared():
                return False
            case Step() | ComparedStep() if wish == "release":
                self._tell(run.send("save"))
                return True
            case Saved() | Phase("sampling" | "exporting" | "certifying"):
                return True
            case _:
                return wish == "cancel" or not stepped

    def _tell(self, progress: Said) -> None:
        if isinstance(progress, Saved):
            progress = dataclasses.replace(progress, folder=_hand_over(progress.folder))
        fields = {f.name: _as_json(getattr(progress, f.name)) for f in dataclasses.fields(progress)}
        self.channel.say(progress={"kind": type(progress).__name__, **fields})


def _hand_over(checkpoint: Path) -> Path:
    """Moves a checkpoint to where the run does not prune it, for the supervisor to store and remove."""
    place = Path(tempfile.mkdtemp(prefix="saved-", dir=checkpoint.parent.parent)) / checkpoint.name
    checkpoint.rename(place)
    return place


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, TrainSpec):
        return value.model_dump(mode="json")
    return value


def sentence_of(error: Exception) -> str:
    """One sentence for the job's owner; the traceback is in the log."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return (
            "The device ran out of memory; "
            "a smaller micro_batch_size, context_length or rank, or packing = false, needs less."
        )
    if isinstance(error, MemoryError):
        return "The machine ran out of memory."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "No space is left on the worker's disk."
    lines = str(error).strip().splitlines()
    return f"The training process met an unexpected {type(error).__name__}" + (
        f": {lines[0][:300]}" if lines else "."
    )


def _device_name() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for the threads that listen and watch."""
    logging.shutdown()
    os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description="Started by the supervisor; not for the command line.")
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    channel = Channel()
    Trainer(channel).serve()


if __name__ == "__main__":
    main()
