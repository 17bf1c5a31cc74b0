"""How to train: the options that all methods share."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Auto, Spec
from .methods.base import MAX_LEARNING_RATE

MAX_CONTEXT = 2**20
Quantization = Literal["none", "nf4", "int8", "torchao-int8", "torchao-fp8"]


class Hyperparameters(Spec):
    """How to train: OpenAI's three hyperparameters first, then ours."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = Field(
        default="auto", description="Passes over the data."
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto", description="Examples in one optimizer step."
    )
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0)] = Field(
        default="auto", description="Multiplies the rate that auto or table gives."
    )
    learning_rate: Literal["auto", "table"] | Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)] = Field(
        default="auto",
        description="Peak rate; table: the method's default for this rank, scale and hidden size; auto: the "
        "mean of that and of a rate measured before the first step.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate falls after the warm-up."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="The gradient norm is clipped to this value.")
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Noise on the embedded tokens in training, supervised only; 0 turns it off "
        "(NEFTune, arXiv 2310.05914).",
    )
    context_length: Auto | Annotated[int, Field(ge=16, le=MAX_CONTEXT)] = Field(
        default="auto",
        description="Longest example in tokens, longer ones are cut; auto: the model's context length.",
    )
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimizer steps.")
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Also evaluate the whole validation file after every this many steps; null: only after "
        "each epoch.",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after this many evaluations in a row without a lower validation loss, and export "
        "the adapter with the lowest; null: never.",
    )
    early_stopping_min_delta: float = Field(
        default=0.0, ge=0, description="How much lower a validation loss must be to count as an improvement."
    )
    samples: int = Field(
        default=4,
        ge=0,
        le=16,
        description="Rows for which sample answers of the base and of the tuned model are shown.",
    )
    micro_batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto",
        description="Most examples in one forward pass; gradients accumulate up to batch_size.",
    )
    micro_batch_tokens: Auto | Annotated[int, Field(ge=16, le=MAX_CONTEXT)] = Field(
        default="auto",
        description="Most tokens in one forward pass, padding included; auto: by an estimate of the memory.",
    )
    packing: Auto | bool = Field(
        default="auto",
        description="Concatenate the examples of a pass in one row, without padding; auto: where that is "
        "exact.",
    )
    gradient_checkpointing: Auto | bool = Field(
        default="auto",
        description="Recompute each block in the backward to save memory; auto: only if needed.",
    )
    train_on_reasoning: bool = Field(
        default=True,
        description="Train the reasoning before an answer too; false: the final answer alone.",
    )
    control_tokens: Literal["refuse", "text"] = Field(
        default="refuse",
        description="Control tokens of the base, such as <|im_end|>, inside messages: refuse the file, or "
        "train them as ordinary text.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of each target's probability that is spread evenly (arXiv 1512.00567).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute precision; auto measures which is faster on this device."
    )
    quantization: Quantization = Field(
        default="none",
        description="Quantisation of the frozen base: nf4, int8 (bitsandbytes), torchao-int8, torchao-fp8, "
        "or none: as in its files.",
    )
    sharding: Auto | Literal["none", "full"] = Field(
        default="auto",
        description="On several devices: shard the base over them (full), or keep a copy on each (none).",
    )
    beta: Auto | Annotated[float, Field(gt=0, le=2)] | None = Field(
        default=None, description="For dpo: how strongly the model is kept near the base; auto is 0.1."
    )

    @property
    def takes_control_tokens(self) -> bool:
        """Whether control tokens inside messages are trained as ordinary text."""
        return self.control_tokens == "text"
