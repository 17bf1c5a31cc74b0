"""The process that trains: one job or comparison after another, on a base model that stays loaded.

It has no database and no network. It exits with its supervisor, and by itself when the current job's lease
was not renewed in time: another worker may have that job already.
"""

import argparse
import dataclasses
import gc
import logging
import os
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from olora_core.errors import OloraError, ProcessLost
from olora_core.progress import (
    Compared,
    ComparedStep,
    ComparisonProgress,
    Finished,
    Phase,
    Progress,
    Saved,
    Step,
    drive,
)
from olora_core.specs import ComparisonSpec, TrainSpec

from ..parent_death import die_with_parent
from ..protocol import Order, StopRequest
from .channel import Channel
from .failures import leave, sentence_of
from .peers import Peers
from .warm_base import WarmBase, check_devices, free_memory, shared_base

if TYPE_CHECKING:
    from olora_core.bases.loading import Base
    from olora_core.devices import Devices


Update = Progress | ComparisonProgress
Work = Generator[Update, str | None, None]

logger = logging.getLogger("olora.trainer")
LOSS_REPORT_SECONDS = 5.0
"""How long to wait for a lost peer's own report, which is more precise."""


class Trainer:
    """Runs one order after another, until the supervisor closes the pipe."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.base = WarmBase()

    def serve(self) -> NoReturn:
        import olora_core.training.train  # noqa: F401  # while the supervisor fetches the files

        gc.freeze()  # the libraries' many objects stay: spare `free_memory` from visiting them each time
        self.channel.send(ready={"pid": os.getpid(), "device": _device_name()})
        while True:
            order = self.channel.orders.get()
            self.channel.send(accepted={"run": order.run})
            self._attempt(order)
            self.channel.end(order.run)
            free_memory()

    def _attempt(self, order: Order) -> None:
        """Runs one order to its final message. Exits when the state of this process is in doubt."""
        runners = {"fine_tuning": self._train, "comparison": self._compare, "export": self._export}
        try:
            runners[order.kind](order)
        except ProcessLost as error:
            self._lost({"crashed": {"message": error.message}})
        except OloraError as error:
            self.channel.send(failed={"code": error.code, "message": error.message, "param": error.param})
        except Exception as error:
            logger.exception("The attempt %s crashed.", order.run)
            self.channel.send(crashed={"message": sentence_of(error)})
            leave(1)

    def _lost(self, message: dict[str, Any]) -> None:
        """Exits after the loss of a peer, which this process may be waiting for in the middle of a step."""
        self.channel.send(**message)
        leave(1)

    def _train(self, order: Order) -> None:
        from olora_core.devices import SINGLE

        spec = TrainSpec.model_validate(order.spec)
        if order.devices > 1:
            self._train_together(order, spec)
        else:
            self._train_on(order, spec, self._warm_base(order, spec), SINGLE)

    def _warm_base(self, order: Order, spec: TrainSpec) -> "Base":
        return self.base.get(Path(order.base), spec, loading=lambda: self._send(Phase("loading", 0, 1)))

    def _train_together(self, order: Order, spec: TrainSpec) -> None:
        """As rank 0 of several processes, each on its own device; on CPUs they share the threads."""
        import torch

        from olora_core.bases.precision import compute_dtype
        from olora_core.bases.sharding import is_sharded
        from olora_core.devices import join

        check_devices(order.devices)
        # All ranks are on this machine: they need no other interface.
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
                join(device, rank=0, count=order.devices, rendezvous_file=peers.rendezvous_file) as devices,
            ):
                if sharding == "full":
                    self.base.drop()
                    self._send(Phase("loading", 0, 1))
                    base = shared_base(order, plan, device, devices)
                else:
                    base = self._warm_base(order, plan)
                try:
                    self._train_on(order, spec, base, devices)
                except ProcessLost:
                    time.sleep(LOSS_REPORT_SECONDS)
                    raise
                finally:
                    peers.finish()  # before `join` closes the process group
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
            day=order.created_on,
            former=Path(order.former) if order.former else None,
        )
        self._drive(run)

    def _export(self, order: Order) -> None:
        """A checkpoint's adapter."""
        from olora_core.training.export_checkpoint import export_checkpoint

        spec = TrainSpec.model_validate(order.spec)
        base = self._warm_base(order, spec)
        Path(order.folder).mkdir(exist_ok=True)
        self._drive(export_checkpoint(base, Path(str(order.resume)), Path(order.folder)))

    def _compare(self, order: Order) -> None:
        """All runs of a comparison use one base."""
        from olora_core.comparison.compare import compare

        spec = ComparisonSpec.model_validate(order.spec)
        run = compare(
            spec,
            self._warm_base(order, spec.training),
            Path(order.training),
            Path(order.validation) if order.validation else None,
            Path(order.folder),
            resume=Path(order.resume) if order.resume else None,
            checkpoint_seconds=order.checkpoint_seconds,
            cache=Path(order.tokens) if order.tokens else None,
            day=order.created_on,
        )
        self._drive(run)

    def _drive(self, run: Work) -> None:
        stepped = False
        request = lambda: "save" if self.channel.stop_request() == "release" else None  # noqa: E731
        with closing(drive(run, request)) as updates:
            for progress in updates:
                self._send(progress)
                stepped = stepped or isinstance(progress, Step | ComparedStep)
                stop_request = self.channel.stop_request()
                if stop_request is not None and self._stops(progress, stop_request, stepped):
                    self.channel.send(stopped={"request": stop_request})
                    return

    def _stops(self, progress: Update, stop_request: StopRequest, stepped: bool) -> bool:
        """Whether the job can be left here: a release does not throw away what the last steps learned."""
        match progress:
            case Finished() | Compared():
                return False
            case Step() | ComparedStep() if stop_request == "release":
                return False  # the checkpoint comes first
            case Saved() | Phase("sampling" | "exporting" | "certifying"):
                return True
            case _:
                return stop_request == "cancel" or not stepped

    def _send(self, progress: Update) -> None:
        if isinstance(progress, Saved):
            progress = dataclasses.replace(progress, folder=_hand_over(progress.folder))
        fields = {f.name: _as_json(getattr(progress, f.name)) for f in dataclasses.fields(progress)}
        self.channel.send(progress={"kind": type(progress).__name__, **fields})


def _hand_over(checkpoint: Path) -> Path:
    """Moves a checkpoint out of reach of the run's pruning, for the supervisor to store and remove."""
    place = Path(tempfile.mkdtemp(prefix="saved-", dir=checkpoint.parent.parent)) / checkpoint.name
    checkpoint.rename(place)
    return place


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, TrainSpec):
        return value.model_dump(mode="json")
    return value


def _device_name() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


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
