"""Examples that come twice, found in memory that does not grow with what they hold."""

import hashlib
import json
from array import array
from typing import Any

LIMIT = 2**20
FIRST_SLOTS = 2**12


def fingerprint(record: dict[str, Any]) -> int:
    """64 bits of what a record holds, whatever the order of its keys; never 0.

    Two different records among a million share theirs once in 30 million files.
    """
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") or 1


class Seen:
    """Fingerprints and where each first came, of the first LIMIT rows: 12 bytes a slot, half of them full.

    An open-addressing table, since a set of a million numbers would take ten times as much.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._count = self._rows = 0
        self._make(FIRST_SLOTS)

    def earlier(self, key: int, number: int) -> int | None:
        """The number of the row that had this fingerprint before, or None after noting this one."""
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
        """Where the fingerprint is, or where it goes."""
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
