"""Duplicate examples, found with memory that does not depend on their length."""

import hashlib
import json
from array import array
from typing import Any

LIMIT = 2**20
FIRST_SLOTS = 2**12


def fingerprint(record: dict[str, Any]) -> int:
    """64-bit hash of a record, independent of the order of its keys; never 0.

    A file of a million different records has a collision with probability 3e-8.
    """
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


class Seen:
    """Fingerprints of the first LIMIT rows, and the row in which each first occurred.

    An open-addressing hash table of 12 bytes a slot, at most half full: a dict of a million ints would take
    about ten times the memory.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._count = self._rows = 0
        self._make(FIRST_SLOTS)

    def earlier(self, key: int, number: int) -> int | None:
        """The earlier row with this fingerprint; None, after recording this one, if there is none."""
        self._rows += 1
        slot = self._slot(key)
        if self._keys[slot]:
            return self._numbers[slot]
        if self._rows <= self.limit:
            self._keys[slot], self._numbers[slot] = key, number
            self._count += 1
            if 2 * self._count > len(self._keys):
                self._grow()
        return None

    def _slot(self, key: int) -> int:
        """The slot of this fingerprint, or the free slot for it."""
        slots = len(self._keys)
        slot = key % slots
        while self._keys[slot] not in (0, key):
            slot = (slot + 1) % slots
        return slot

    def _grow(self) -> None:
        keys, numbers = self._keys, self._numbers
        self._make(2 * len(keys))
        for key, number in zip(keys, numbers, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._numbers[slot] = key, number

    def _make(self, slots: int) -> None:
        self._keys = array("Q", bytes(8 * slots))
        self._numbers = array("I", bytes(4 * slots))
