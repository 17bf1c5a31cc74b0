"""The seeds of named draws."""

import hashlib

from olora_core.seeds import seed_of


def test_a_seed_is_the_first_bits_of_the_names_digest() -> None:
    digest = bin(int(hashlib.sha256(b"order/7/1").hexdigest(), 16))[2:].zfill(256)
    assert seed_of("order/7/1") == int(digest[:63], 2)
    assert seed_of("order/7/1", bits=64) == int(digest[:64], 2)
