"""What an attempt works on, fetched to this machine: the base model, the files and a checkpoint."""

from datetime import UTC, datetime
from pathlib import Path

from olora_core.errors import CheckpointError
from store.bases import fetch_base, find_base
from store.checkpoints import exported_checkpoint, get_checkpoint
from store.errors import StorageError, StoreError
from store.files import get_file
from store.kinds import EXPORT
from store.models import Checkpoint, Job
from store.settings import Settings
from store.storage import Storage

from ..protocol import Order
from .archive import unpack
from .fenced import FencedSessions
from .token_folders import tokens_folder


class Inputs:
    """Fetches a claimed job's inputs into the attempt's `folder`, or finds them where they are."""

    def __init__(self, fenced: FencedSessions, *, settings: Settings, storage: Storage, folder: Path) -> None:
        self.claim = fenced.claim
        self.read = fenced.read
        self.settings = settings
        self.storage = storage
        self.folder = folder

    def check_devices(self, job: Job) -> None:
        """Raises StoreError for more devices than this service's workers have."""
        asked, own = job.options.get("devices", 1), self.settings.devices_per_worker
        if asked > own:
            message = (
                f"olora.devices = {asked}, and the workers of this service own {own} each; ask for fewer, or "
                "have its operator raise OLORA_DEVICES_PER_WORKER."
            )
            raise StoreError(message, param="olora.devices", code="too_many_devices")

    def order(self, job: Job, *, run: str, deadline: float) -> Order:
        """What the trainer is to do, from the start. Raises ModelError, and StoreError for a missing file."""
        claim = self.claim
        base = fetch_base(find_base(self.settings, claim.spec.model), self.settings)
        if claim.kind is EXPORT:
            return self._export_order(job, base, run=run, deadline=deadline)
        training = self._fetch(job.training_file, claim.training_key, "training")
        validation = None
        if job.validation_file:
            validation = self._fetch(job.validation_file, claim.validation_key, "validation")
        return Order(
            run=run,
            spec=claim.spec.model_dump(mode="json"),
            base=str(base),
            training=str(training),
            validation=str(validation) if validation else None,
            folder=str(self.folder / "work"),
            resume=None,
            checkpoint_seconds=self.settings.checkpoint_seconds,
            deadline=deadline,
            tokens=tokens_folder(self.settings, claim.project_id),
            devices=job.options.get("devices", 1),
            day=datetime.fromtimestamp(job.created_at, UTC).date().isoformat(),
            kind=claim.kind.name,
            former=self._former(job),
        )

    def _export_order(self, job: Job, base: Path, *, run: str, deadline: float) -> Order:
        """What the trainer is to do with a checkpoint; it needs no files. Raises StorageError."""
        checkpoint = self.read(exported_checkpoint, job)
        assert checkpoint.storage_key is not None
        folder = self.folder / "checkpoint"
        self.storage.fetch_folder(checkpoint.storage_key, folder)
        return Order(
            run=run,
            spec=self.claim.spec.model_dump(mode="json"),
            base=str(base),
            training="",
            validation=None,
            folder=str(self.folder / "work"),
            resume=str(folder),
            checkpoint_seconds=0.0,
            deadline=deadline,
            kind=EXPORT.name,
        )

    def _former(self, job: Job) -> str | None:
        """The folder with the adapter that the job trains on from. Raises StoreError if it is gone."""
        if job.former_model is None:
            return None
        folder = self.folder / "former"
        if job.former_checkpoint is not None:
            checkpoint = self.read(get_checkpoint, job.project_id, job.former_checkpoint)
            assert checkpoint.storage_key is not None
            self.storage.fetch_folder(checkpoint.storage_key, folder)
        else:
            file = self.read(get_file, job.project_id, str(job.former_file))
            assert file.storage_key is not None
            packed = self.folder / "former.zip"
            self.storage.fetch(file.storage_key, packed)
            unpack(packed, folder)
            packed.unlink()
            if not job.former_model.startswith("ft:"):
                folder = _of_peft(folder)
        return str(folder)

    def checkpoint(self, stored: Checkpoint) -> Path:
        """Raises CheckpointError when its bytes are not those that were stored."""
        assert stored.storage_key is not None
        path = self.folder / f"resume-{stored.id}"
        try:
            self.storage.fetch_folder(stored.storage_key, path)
        except StorageError as error:
            raise CheckpointError(error.message) from error
        return path

    def _fetch(self, file_id: str, key: str | None, role: str) -> Path:
        if not key or not self.storage.exists(key):
            again = f"create a new {self.claim.kind.word}"
            message = f"The {role} file is no longer stored; upload it again and {again}."
            raise StoreError(message, param=f"{role}_file", code=f"invalid_{role}_file")
        path = self.folder / role / file_id  # a comparison's report names its files by these names
        path.parent.mkdir()
        self.storage.fetch(key, path)
        return path


def _of_peft(folder: Path) -> Path:
    """The folder of an uploaded adapter in an unpacked zip: taken as a plain LoRA, whoever made it."""
    found = sorted(folder.rglob("adapter_config.json"), key=lambda path: len(path.parts))
    inside = found[0].parent if found else folder
    (inside / "manifest.json").unlink(missing_ok=True)
    return inside
