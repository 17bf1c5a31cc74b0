"""A follower rank: runs rank 0's steps on its own device and reports only its own failure.

It exits with code 0 when rank 0's run is over, however that ended. If it fails itself, it sends one message
and exits with code 1. The trainer starts it; see `peers.py`.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from olora_core.errors import OloraError, ProcessLost
from olora_core.specs import TrainSpec

from ..parent_death import die_with_parent
from ..protocol import Order, claim_descriptors
from .failures import leave, sentence_of
from .warm_base import shared_base

logger = logging.getLogger("olora.peer")


def follow(order: Order, rank: int, rendezvous_file: Path) -> None:
    import torch

    from olora_core.devices import join
    from olora_core.training.train import train

    spec = TrainSpec.model_validate(order.spec)
    device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    with join(device, rank=rank, count=order.devices, rendezvous_file=rendezvous_file) as devices:
        run = train(
            spec,
            shared_base(order, spec, device, devices),
            Path(order.training),
            Path(order.validation) if order.validation else None,
            Path(order.folder),
            resume=Path(order.resume) if order.resume else None,
            cache=Path(order.tokens) if order.tokens else None,
            devices=devices,
            day=order.created_on,
            former=Path(order.former) if order.former else None,
        )
        for _ in run:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description="Started by the trainer; not for the command line.")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--rendezvous-file", type=Path, required=True)
    options = parser.parse_args()
    die_with_parent(options.parent)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    received, sent = claim_descriptors()

    def send(**message: Any) -> None:
        sent.write(json.dumps(message).encode() + b"\n")
        sent.flush()

    try:
        follow(Order(**json.loads(received.readline())), options.rank, options.rendezvous_file)
    except ProcessLost as error:
        send(crashed={"message": error.message})
    except OloraError as error:
        send(failed={"code": error.code, "message": error.message, "param": error.param})
    except Exception as error:
        logger.exception("A peer crashed.")
        send(crashed={"message": sentence_of(error)})
    else:
        leave(0)
    leave(1)


if __name__ == "__main__":
    main()
