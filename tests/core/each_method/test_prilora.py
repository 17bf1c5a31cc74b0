"""PRILoRA: the ladder of ranks, what the running norm sees, and what a pruning takes away."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from olora_core import methods
from olora_core.data.batches import IGNORED, MicroBatch
from olora_core.errors import SpecError
from olora_core.layers.adapter import AdaptedLinear, Site
from olora_core.methods import Outputs
from olora_core.methods import prilora as prilora_file
from olora_core.methods.prilora import PRILoRA, PRILoRAAdapter, squares
from olora_core.specs import read_spec
from olora_core.specs.methods.prilora import PRILoRASpec

from ..runs import chat_rows, losses, preference_rows, spec_for, train, write_rows

OUT, IN = 6, 10


def prilora(*, total_steps: int = 100, **options: Any) -> tuple[PRILoRA, AdaptedLinear]:
    """The method with one layer, IN to OUT wide and of rank 4, whose factors are random."""
    spec = PRILoRASpec(**{"rank": 4} | options)
    method = PRILoRA(spec, seed=0, total_steps=total_steps, schedule=lambda i, n: 1.0)
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    adapter = method.adapter(layer.weight, Site("layer", None, 0, "linear", OUT, IN))
    method.on_attached({"layer": adapter})
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        adapter.A.normal_(generator=draw)
        adapter.B.normal_(generator=draw)
        adapter.norm.uniform_(0.5, 2, generator=draw)
    return method, AdaptedLinear(layer, adapter)


def show(method: PRILoRA, layer: AdaptedLinear, x: Tensor, lengths: tuple[int, ...], **more: Any) -> None:
    """One micro-batch: x (rows, length, IN), padded behind each row's tokens."""
    ids, none = torch.zeros(x.shape[:2], dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    batch = MicroBatch(ids, ids + IGNORED, None, none, none, lengths, (0,) * len(lengths), 0)
    method.before_pass(batch)
    layer(x)
    method.after_pass(Outputs(None, batch.labels, torch.zeros(()), **more))


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the ladder --------------------------------------------------------------------------------------------


def ladder(layers: int, **options: Any) -> list[int]:
    spec = PRILoRASpec(**options)
    return [spec.rank_at(layer, layers) for layer in range(layers)]


def test_the_ranks_are_those_of_the_paper() -> None:
    """4 to 12 over twelve blocks; 1.33 M numbers in six matrices a block of DeBERTaV3-base."""
    ranks = ladder(12)
    assert ranks == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]
    per_rank = 4 * (768 + 768) + 2 * (768 + 3072)
    assert sum(ranks) * per_rank == 1_327_104


@pytest.mark.parametrize("layers", range(12, 37))
def test_ranks_never_fall_and_their_mean_is_the_rank(layers: int) -> None:
    ranks = ladder(layers)
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (4, 12)
    halves = (layers - 1) / 16 in (1, 2)  # steps of 1/2 and 1/4, whose halves are all rounded up
    assert sum(ranks) == 8 * layers + 4 * halves


def test_a_ladder_may_be_level_reversed_or_of_one_step() -> None:
    assert ladder(5, first_rank=8) == [8] * 5
    assert ladder(3, first_rank=12) == [12, 8, 4]
    assert ladder(1) == [8]
    assert PRILoRASpec().rank_at(None, 0) == 8
    assert ladder(2, rank=1) == [1, 1]
    assert PRILoRASpec(first_rank=12).pair_rank == PRILoRASpec().pair_rank == 12


def test_a_first_rank_that_leaves_nothing_for_the_last_layer_is_refused() -> None:
    with pytest.raises(SpecError, match="less than 2 rank = 16") as refused:
        read_spec(model="m", adapter={"method": "prilora", "first_rank": 16})
    assert refused.value.param == "adapter.first_rank"


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, (16 / 4, 16 / 12)),
        ({"scale_by": "rank"}, (2, 2)),
        ({"rslora": True}, (16 / 2, 16 / 12**0.5)),
    ],
)
def test_the_scale_follows_the_layers_rank_unless_told_otherwise(options, scales) -> None:
    method = PRILoRA(PRILoRASpec(**options), seed=0, total_steps=1, schedule=lambda i, n: 1.0)
    W = torch.zeros(20, 30)
    first, last = (method.adapter(W, Site("x", layer, 12, "linear", 20, 30)) for layer in (0, 11))
    assert (first.A.shape, last.A.shape) == ((4, 30), (12, 30))
    assert (first.scale, last.scale) == pytest.approx(scales)


# --- the running norm --------------------------------------------------------------------------------------


def test_the_norm_follows_the_root_mean_square_of_each_steps_tokens() -> None:
    method, layer = prilora(importance_decay=0.9)
    expected = torch.zeros(IN, dtype=torch.float64)
    for step in (1, 2, 3):
        x = drawn(2, 5, IN, seed=step)
        show(method, layer, x, (5, 3))
        show(method, layer, 3 * x, (4, 4))
        method.after_backward(step)
        tokens = torch.cat([x[0, :5], x[1, :3], 3 * x[0, :4], 3 * x[1, :4]]).double()
        now = tokens.square().mean(dim=0).sqrt()
        expected = now if step == 1 else 0.9 * expected + 0.1 * now
        torch.testing.assert_close(layer.adapter.norm.double(), expected, rtol=1e-6, atol=0)


def test_inputs_of_any_length_are_summed_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(prilora_file, "SQUARES_AT_ONCE", 3 * IN)
    x, is_token = drawn(2, 7, IN), torch.arange(7) < torch.tensor([[7], [4]])
    seen = squares(x, is_token)
    expected = x[is_token].double().square().sum(dim=0)
    torch.testing.assert_close(seen[:-1].double(), expected, rtol=1e-6, atol=0)
    assert seen[-1] == 11


def test_a_constant_input_is_its_own_norm() -> None:
    method, layer = prilora()
    for step in (1, 2):
        show(method, layer, torch.full((1, 4, IN), -2.5), (4,))
        method.after_backward(step)
    torch.testing.assert_close(layer.adapter.norm, torch.full((IN,), 2.5))


def test_what_does_not_count_leaves_the_norm_alone() -> None:
    method, layer = prilora()
    x = drawn(1, 4, IN)
    show(method, layer, x, (4,))
    method.after_backward(1)
    before = layer.adapter.norm.clone()
    show(method, layer, 9 * x, (4,))
    method.on_step_retry()  # memory ran out
    show(method, layer, 9 * x, (4,), repeated=True)  # it only keeps step with other devices
    layer(9 * x)  # a block's second forward, after the loss, is not even looked at
    assert layer.adapter.pending is None
    layer.eval()
    show(method, layer, 9 * x, (4,))
    method.after_backward(2)
    assert torch.equal(layer.adapter.norm, before)


def test_a_layer_that_is_used_twice_in_a_pass_counts_both() -> None:
    method, layer = prilora()
    square = nn.Sequential(layer, nn.Linear(OUT, IN), layer)
    x = drawn(1, 4, IN)
    ids, none = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    method.before_pass(MicroBatch(ids, ids, None, none, none, (4,), (0,), 0))
    square(x)
    method.after_pass(Outputs(None, ids, torch.zeros(())))
    method.after_backward(1)
    inputs = torch.cat([x[0], square[:2](x)[0]]).double()
    torch.testing.assert_close(
        layer.adapter.norm.double(), inputs.square().mean(dim=0).sqrt(), rtol=1e-5, atol=0
    )


class Watched(PRILoRA):
    """What the norms are after the first step, and what the passes of that step were."""

    norms: ClassVar[dict[str, Tensor]] = {}
    batches: ClassVar[list[MicroBatch]] = []

    def on_attached(self, adapters: Any) -> None:
        super().on_attached(adapters)
        self.by_name = adapters

    def before_pass(self, batch: MicroBatch) -> None:
        super().before_pass(batch)
        if self.finished_steps == 0:
            self.batches.append(batch)

    def after_backward(self, step: int) -> None:
        super().after_backward(step)
        if step == 1:
            self.norms.update({name: adapter.norm.clone() for name, adapter in self.by_name.items()})


PASSES = {
    "a row each": {"micro_batch_size": 1, "packing": False},
    "padded": {"micro_batch_size": 4, "packing": False},
    "two halves": {"micro_batch_size": 2, "packing": False},
    "packed": {"micro_batch_size": 4, "packing": True},
    "checkpointed": {"micro_batch_size": 4, "packing": False, "gradient_checkpointing": True},
}


@pytest.mark.parametrize(("type", "rows"), [("supervised", chat_rows), ("dpo", preference_rows)])
def test_a_batch_has_the_same_norms_however_it_is_computed(
    llama, tmp_path: Path, monkeypatch, type: str, rows: Any
) -> None:
    """The base's own inputs, row by row: at the first step the adapters change nothing yet."""
    monkeypatch.setitem(methods.METHODS, "prilora", Watched)
    training = write_rows(tmp_path / "training.jsonl", rows())
    found, is_padded, tokens = {}, {}, []
    for name, options in PASSES.items():
        monkeypatch.setattr(Watched, "norms", {})
        monkeypatch.setattr(Watched, "batches", [])
        spec = spec_for("prilora", type=type, max_steps=1, **options)
        list(train(spec, llama, training, None, tmp_path / name.replace(" ", "-")))
        found[name] = Watched.norms
        is_padded[name] = any(batch.is_token is not None for batch in Watched.batches)
        if name == "padded":
            (batch,) = Watched.batches
            tokens = [ids[:length] for ids, length in zip(batch.input_ids, batch.lengths, strict=True)]
    assert is_padded["padded"]
    assert is_padded["packed"], "a packed row is filled, and what fills it must not count"
    seen: dict[str, list[Tensor]] = {name: [] for name in found["padded"]}
    for name in seen:
        layer = llama.model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0][0].double()))
    for ids in tokens:
        llama.model(ids[None])
    for norms in found.values():
        for name, inputs in seen.items():
            expected = torch.cat(inputs).square().mean(dim=0).sqrt()
            torch.testing.assert_close(norms[name].double(), expected, rtol=1e-4, atol=1e-6)


# --- the pruning -------------------------------------------------------------------------------------------


def take_step(method: PRILoRA, layer: AdaptedLinear, step: int, rate: float = 0.0) -> None:
    optimizer = torch.optim.SGD(layer.adapter.parameters(), lr=rate)
    layer(drawn(3, IN)).square().sum().backward()
    optimizer.step()
    method.after_step(step, optimizer)
    optimizer.zero_grad()


@pytest.mark.parametrize(("group", "zeros"), [("row", [3, 3, 3, 3]), ("matrix", None)])
def test_a_pruning_zeroes_the_least_important_share_of_a(group: str, zeros: list[int] | None) -> None:
    method, layer = prilora(prune_share=0.35, prune_every=5, prune_group=group)
    adapter = layer.adapter
    A, B = adapter.A.detach().clone(), adapter.B.detach().clone()
    importance = A.double().abs() * adapter.norm.double()
    for step in range(1, 6):
        take_step(method, layer, step)
        assert torch.equal(adapter.A, A) is (step < 5)
    gone = adapter.A == 0
    assert torch.equal(adapter.A[~gone], A[~gone])
    assert torch.equal(adapter.B, B)
    if zeros is None:
        assert int(gone.sum()) == 14  # 0.35 of 40
        assert importance[~gone].min() >= importance[gone].max()
    else:
        assert gone.sum(dim=1).tolist() == zeros
        for row, dropped in zip(importance, gone, strict=True):
            assert row[~dropped].min() >= row[dropped].max()


def test_a_features_size_weighs_as_much_as_its_factor() -> None:
    method, layer = prilora(prune_share=0.5, prune_every=1)
    with torch.no_grad():
        layer.adapter.A.fill_(1.0)
        layer.adapter.A[:, 0] = 0.1
        layer.adapter.norm.copy_(torch.arange(10.0, 20.0))
        layer.adapter.norm[0] = 1000.0
    take_step(method, layer, 1)
    assert (layer.adapter.A != 0).tolist() == [[i in (0, 6, 7, 8, 9) for i in range(IN)]] * 4


def test_of_equal_entries_the_first_go() -> None:
    method, layer = prilora(prune_share=0.3, prune_every=1)
    with torch.no_grad():
        layer.adapter.A.fill_(-1.0)
        layer.adapter.norm.fill_(1.0)
    take_step(method, layer, 1)
    assert (layer.adapter.A != 0).tolist() == [[i >= 3 for i in range(IN)]] * 4


@pytest.mark.parametrize("regrow", [True, False])
def test_pruned_entries_grow_again_unless_they_are_to_stay(regrow: bool) -> None:
    method, layer = prilora(prune_every=2, regrow=regrow)
    take_step(method, layer, 1, rate=0.01)
    take_step(method, layer, 2, rate=0.01)
    gone = layer.adapter.A == 0
    assert int(gone.sum()) == 4 * 5
    take_step(method, layer, 3, rate=0.01)
    assert bool((layer.adapter.A[gone] != 0).all()) is regrow
    assert bool((layer.adapter.A[gone] == 0).all()) is not regrow


@pytest.mark.parametrize("at_end", [True, False])
def test_the_last_step_prunes_too_unless_told_otherwise(at_end: bool) -> None:
    method, layer = prilora(total_steps=3, prune_at_end=at_end)
    for step in (1, 2, 3):
        take_step(method, layer, step)
    assert bool((layer.adapter.A == 0).any()) is at_end


def test_a_pruning_before_anything_is_learned_changes_no_output() -> None:
    _, layer = prilora()
    x = drawn(3, IN)
    layer.adapter.B.data.zero_()
    before = layer(x)
    layer.adapter.prune(0.5, by_row=True)
    assert torch.equal(layer(x), before)


def test_a_level_ladder_without_pruning_is_lora_bit_for_bit(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    lora = losses(train(spec_for("lora"), llama, training, None, tmp_path / "lora"))
    level = {"first_rank": 4, "prune_share": 0.0, "prune_every": 1}
    spec = spec_for("prilora", adapter=level)
    assert losses(train(spec, llama, training, None, tmp_path / "level")) == lora
    spec = spec_for("prilora", adapter=level | {"prune_share": 0.5})
    assert losses(train(spec, llama, training, None, tmp_path / "pruned")) != lora


def test_the_exported_a_holds_the_zeros(llama, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    *_, finished = train(spec_for("prilora"), llama, training, None, tmp_path / "run")
    tensors = load_file(finished.folder / "adapter_model.safetensors")
    ranks = {0: 2, 1: 6}
    for name, A in tensors.items():
        if "lora_A" in name:
            rank = ranks[int(name.split(".layers.")[1][0])]
            assert A.shape[0] == 6
            assert (A[:rank] == 0).sum(dim=1).tolist() == [A.shape[1] // 2] * rank
            assert not A[rank:].any()


def test_what_was_seen_travels_in_no_checkpoint() -> None:
    _, layer = prilora(regrow=False)
    assert isinstance(layer.adapter, PRILoRAAdapter)
    assert layer.adapter.state_dict().keys() == {"A", "B", "norm", "kept"}
