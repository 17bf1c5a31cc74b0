"""Seeds for random draws, made of the draw's name."""

import hashlib


def seed_of(draw: str, *, bits: int = 63) -> int:
    """A seed for the draw of this name, such as "order/<seed>/<epoch>": from 0 up to 2^bits, not included.

    A draw that has its own generator depends on nothing that was drawn before: a resumed run needs no
    generator's state, and every process of a run draws the same. 63 bits are what torch's generators take.
    """
    digest = hashlib.sha256(draw.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)
