"""Causal families of transformers whose tiny model is not trained, with the reason.

The trials keep this true: a family that is named here and trains fails its test, and so does one that fails
and is not named.
"""

from typing import NamedTuple


class Unfit(NamedTuple):
    """Why a family is not trained."""

    says: str
    """What its trial's reason has to contain."""
    reason: str
    """For the page."""


EXCEPTIONS: dict[str, Unfit] = {
    "cpmant": Unfit("padded at its end", "refused: it reads a row that is padded at its end as another text"),
    "gemma3n": Unfit("requires the timm library", "not tried: its vision tower needs the package timm"),
    "gemma4_assistant": Unfit(
        "hidden_size_per_layer_input must be 0", "not tried: it drafts from a larger model's hidden states"
    ),
    "gemma4_unified_assistant": Unfit(
        "layer types producing a cache", "not tried: it drafts from a larger model's hidden states"
    ),
    "musicgen": Unfit("no attribute 'dropout'", "not tried: it writes codes of sound"),
    "musicgen_melody": Unfit("no attribute 'dropout'", "not tried: it writes codes of sound"),
    "prophetnet": Unfit("the padding behind it", "refused: its logits depend on the padding behind a text"),
    "reformer": Unfit(
        "does not compute logits of text alone", "refused: it trains only on rows of a fixed length"
    ),
}
