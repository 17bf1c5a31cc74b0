"""BA-LoRA's penalties against their formulas in float64, and where a run takes them in."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_core import methods
from olora_core.errors import SpecError
from olora_core.layers.adapter import adapters_off
from olora_core.methods import Outputs, ba_lora
from olora_core.methods.ba_lora import (
    BALoRA,
    consistency_factor,
    consistency_loss,
    diversity_loss,
    late_factor,
    predicting,
    spectrum_loss,
)
from olora_core.specs import TrainSpec, read_spec
from olora_core.specs.methods.ba_lora import BALoRASpec
from olora_core.training.memory import LiveBytes

from ..runs import chat_rows, losses, spec_for, train, write_rows
from .test_methods import adapted, make_llama, make_method
from .test_pissa import best_part, weight_of

IGNORED = -100
V, K, TAU = 60, 20, 2.0
LAMBDAS = {"lambda_consistency": 0.25, "lambda_diversity": 0.5, "lambda_spectrum": 0.75}
NO_PENALTY = dict.fromkeys(LAMBDAS, 0.0)


def random_logits(*shape: int, seed: int = 0, size: float = 3.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the formulas, in float64 and row by row ---------------------------------------------------------------


def written_consistency(Z_P: Tensor, Z: Tensor, tau: float = TAU) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p, f in zip(Z_P.double(), Z.double(), strict=True):
        p, f = torch.softmax(p / tau, 0), torch.softmax(f / tau, 0)
        total = total + (p * (p / f).log()).sum()
    return tau**2 * total / len(Z)


def written_diversity(Z: Tensor, top: int = K) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in Z.double():
        p = torch.softmax(row.sort(descending=True).values[:top], 0)
        total = total + (p * p.log()).sum()
    return total / len(Z)


def written_spectrum(Z: Tensor, k: int = 10, norm: str = "frobenius") -> Tensor:
    values = torch.linalg.svdvals(Z.double())
    return -values[:k].sum() / (values.sum() if norm == "nuclear" else values.square().sum().sqrt())


def test_the_terms_are_their_formulas() -> None:
    Z_P, Z = random_logits(30, V), random_logits(30, V, seed=1)
    assert consistency_loss(Z_P, Z, TAU).item() == pytest.approx(written_consistency(Z_P, Z).item())
    assert diversity_loss(Z, K).item() == pytest.approx(written_diversity(Z).item())
    for norm in ("frobenius", "nuclear"):
        expected = written_spectrum(Z, norm=norm).item()
        assert spectrum_loss(Z, 10, norm=norm).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("term", "written"),
    [
        (lambda Z: consistency_loss(random_logits(30, V), Z, TAU), lambda Z: written_consistency(ZP, Z)),
        (lambda Z: diversity_loss(Z, K), written_diversity),
        (lambda Z: spectrum_loss(Z, 10), written_spectrum),
        (lambda Z: spectrum_loss(Z, 10, norm="nuclear"), lambda Z: written_spectrum(Z, norm="nuclear")),
    ],
)
def test_their_gradients_are_exact(term: Callable[..., Tensor], written: Callable[..., Tensor]) -> None:
    Z = random_logits(30, V, seed=1).requires_grad_()
    exact = Z.detach().double().requires_grad_()
    term(Z).backward()
    written(exact).backward()
    assert (Z.grad.double() - exact.grad).norm() < 1e-5 * exact.grad.norm()


ZP = random_logits(30, V)


# --- what each term can be ---------------------------------------------------------------------------------


def test_consistency_is_nothing_at_the_base_and_positive_elsewhere() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        Z = random_logits(9, V).to(dtype)
        assert consistency_loss(Z, Z.clone(), TAU).item() == 0
    for size in (1e-3, 1e-1, 1, 10):
        moved = Z.float() + random_logits(9, V, seed=2, size=size)
        assert consistency_loss(Z.float(), moved, TAU) > 0


def test_diversity_lies_between_one_sure_token_and_all_equal_ones() -> None:
    equal = torch.zeros(5, V)
    equal[:, K:] = -3.0
    assert diversity_loss(equal, K).item() == pytest.approx(-math.log(K))
    sure = torch.zeros(5, V)
    sure[:, 7] = 100.0
    assert diversity_loss(sure, K).item() == pytest.approx(0)
    for size in (0.01, 1, 100):
        assert -math.log(K) - 1e-6 <= diversity_loss(random_logits(5, V, size=size), K) <= 0


def test_diversity_raises_the_entropy_of_the_likeliest_tokens_alone() -> None:
    Z = random_logits(5, V).requires_grad_()
    diversity_loss(Z, K).backward()
    reached = Z.grad != 0
    assert reached.sum(dim=-1).tolist() == [K] * 5
    assert torch.equal(reached.nonzero()[:, 1].view(5, K), Z.topk(K).indices.sort(dim=-1).values)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_spectrum_lies_in_its_bounds_and_knows_no_size(factor: float) -> None:
    for rows in (4, 30, 100):
        Z = random_logits(rows, V, seed=rows)
        for k in (1, 3, 10):
            share = spectrum_loss(factor * Z, k).item()
            assert -math.sqrt(k) <= share < 0
            assert share == pytest.approx(spectrum_loss(Z, k).item(), rel=1e-5)
            share = spectrum_loss(factor * Z, k, norm="nuclear").item()
            assert -1 - 1e-6 <= share <= -min(k, rows, V) / min(rows, V)
            assert share == pytest.approx(spectrum_loss(Z, k, norm="nuclear").item(), rel=1e-5)


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
def test_a_spectrum_of_one_direction_is_minus_one_and_has_a_gradient(norm: str) -> None:
    Z = (random_logits(40, 1) @ random_logits(1, V, seed=1)).requires_grad_()
    value = spectrum_loss(Z, 10, norm=norm)
    assert value.item() == pytest.approx(-1, abs=1e-5)
    value.backward()
    assert Z.grad.isfinite().all()


def test_logits_that_are_all_zero_have_no_spectrum_and_no_gradient() -> None:
    Z = torch.zeros(5, V, requires_grad=True)
    spectrum_loss(Z, 10).backward()
    assert not Z.grad.any()


def test_of_many_rows_256_evenly_spaced_ones_are_looked_at() -> None:
    Z = random_logits(1000, 300)
    spaced = Z[[i * 1000 // 256 for i in range(256)]]
    assert spectrum_loss(Z, 10).item() == pytest.approx(written_spectrum(spaced).item(), rel=1e-5)


def test_centred_logits_leave_no_room_for_a_constant() -> None:
    """Which softmax cannot see, and which would make the largest singular value as large as one likes."""
    Z = random_logits(30, V)
    lifted = Z + 50.0
    assert spectrum_loss(lifted, 1) < spectrum_loss(Z, 1) - 0.4
    centred = spectrum_loss(lifted, 1, center=True).item()
    assert centred == pytest.approx(spectrum_loss(Z, 1, center=True).item(), rel=1e-4)


def test_pieces_of_the_divergence_are_the_whole(monkeypatch) -> None:
    Z_P, Z = random_logits(30, V), random_logits(30, V, seed=1).requires_grad_()
    at_once = consistency_loss(Z_P, Z, TAU)
    (expected,) = torch.autograd.grad(at_once, Z)
    monkeypatch.setattr(ba_lora, "LOGITS_AT_ONCE", 4 * V)
    in_pieces = consistency_loss(Z_P, Z, TAU)
    (gradient,) = torch.autograd.grad(in_pieces, Z)
    torch.testing.assert_close(in_pieces, at_once)
    torch.testing.assert_close(gradient, expected)


def test_the_schedules_are_the_scripts() -> None:
    at = (0, 0.2, 0.225, 0.25, 1)
    assert [late_factor(u) for u in at] == pytest.approx([0, 0, 0.5, 1, 1])
    falling = [consistency_factor(u) for u in (0, 0.5, 1)]
    assert falling == pytest.approx([1, 0.55, 0.1])
    assert [consistency_factor(u / 9) for u in range(10)] == sorted(
        (consistency_factor(u / 9) for u in range(10)), reverse=True
    )


# --- the penalty of a micro-batch --------------------------------------------------------------------------


def some_labels() -> Tensor:
    """(2, 8): two prompts of 3 and 5 tokens, answers of 4 and 2, then padding."""
    labels = torch.full((2, 8), IGNORED)
    labels[0, 3:7] = 1
    labels[1, 5:7] = 1
    return labels


def outputs_of(logits: Tensor, labels: Tensor | None = None) -> Outputs:
    labels = some_labels() if labels is None else labels
    return Outputs(logits, labels, torch.zeros(()))


def method_at(over: float, **options: Any) -> BALoRA:
    method = make_method("ba_lora", **LAMBDAS | options)
    assert isinstance(method, BALoRA)
    method.finished_steps = round(over * method.total_steps)
    return method


def test_a_position_counts_when_it_predicts_a_trained_token() -> None:
    logits = torch.arange(16.0).view(2, 8, 1)
    # The last of the prompt predicts the answer's first token; the answer's last predicts nothing trained.
    assert predicting(logits, some_labels()).flatten().tolist() == [2, 3, 4, 5, 8 + 4, 8 + 5]


def test_the_penalty_is_the_weighted_sum_of_the_terms() -> None:
    base, own = random_logits(2, 8, V), random_logits(2, 8, V, seed=1)
    counted = torch.tensor([2, 3, 4, 5, 12, 13])
    Z_P, Z = base.flatten(0, 1)[counted], own.flatten(0, 1)[counted]
    for over, falling, late in ((0.0, 1.0, 0.0), (0.5, 0.55, 1.0), (1.0, 0.1, 1.0)):
        got = method_at(over).penalty(outputs_of(own), lambda: base)
        terms = written_consistency(Z_P, Z), written_diversity(Z), written_spectrum(Z)
        expected = 0.25 * falling * terms[0] + late * (0.5 * terms[1] + 0.75 * terms[2])
        assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_logits_at_ignored_positions_change_nothing() -> None:
    base, own = random_logits(2, 8, V), random_logits(2, 8, V, seed=1)
    method = method_at(0.5)
    before = method.penalty(outputs_of(own), lambda: base)
    ignored = torch.ones(16, dtype=torch.bool)
    ignored[[2, 3, 4, 5, 12, 13]] = False
    for logits in (base, own):
        logits.view(16, V)[ignored] += 5.0
    assert torch.equal(method.penalty(outputs_of(own), lambda: base), before)


def test_the_base_is_asked_only_where_consistency_counts() -> None:
    own, asked = random_logits(2, 8, V), []

    def reference() -> Tensor:
        asked.append(True)
        return own

    assert method_at(0.5, lambda_consistency=0.0).penalty(outputs_of(own), reference) is not None
    assert method_at(0.0, lambda_consistency=0.0).penalty(outputs_of(own), reference) is None
    assert method_at(0.5, **NO_PENALTY).penalty(outputs_of(own), reference) is None
    assert not asked
    method_at(0.5).penalty(outputs_of(own), reference)
    assert len(asked) == 1


def test_of_a_single_token_only_the_consistency_is_judged() -> None:
    base, own = random_logits(1, 4, V), random_logits(1, 4, V, seed=1)
    labels = torch.tensor([[IGNORED, IGNORED, 3, IGNORED]])
    got = method_at(0.5).penalty(outputs_of(own, labels), lambda: base)
    assert got.item() == pytest.approx(0.25 * 0.55 * written_consistency(base[0, 1:2], own[0, 1:2]).item())


def test_no_gradient_reaches_the_reference(token_rows: Tensor) -> None:
    model = make_llama()
    adapters = adapted(model, method_at(0.5))
    with adapters_off(model), torch.no_grad():
        base = model(token_rows).logits
    before = base.clone()
    method_at(0.5).penalty(outputs_of(model(token_rows).logits, token_rows), lambda: base).backward()
    assert not base.requires_grad
    assert torch.equal(base, before)
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapter." not in name)
    assert any(p.grad.any() for a in adapters.values() for p in a.parameters())


def test_the_penalty_holds_no_more_than_it_says() -> None:
    """Beside pieces of a fixed size, which the logits of a real model outweigh."""
    own = random_logits(4, 256, 2000).requires_grad_()
    base, labels = random_logits(4, 256, 2000, seed=1), torch.ones(4, 256, dtype=torch.int64)
    method, live = method_at(0.5), LiveBytes()
    with pytest.MonkeyPatch.context() as patch, live:
        patch.setattr(ba_lora, "LOGITS_AT_ONCE", 2000)
        patch.setattr(ba_lora, "SPECTRUM_ROWS", 8)
        method.penalty(outputs_of(own, labels), base.clone).backward()
    logits = own.numel() * 4
    assert 4 * logits < live.peak <= method.penalty_copies * logits


# --- the start ---------------------------------------------------------------------------------------------


def test_it_starts_where_it_is_told_to() -> None:
    W = weight_of((40, 24))
    site = methods.base.Site("layer", None, 0, "linear", 40, 24)
    pissa = make_method("ba_lora", svd_iterations=None).adapter(W, site)
    expected = best_part(W, 4)
    assert (6 / 4 * pissa.B0.double() @ pissa.A0.double() - expected).norm() < 1e-4 * expected.norm()
    same = make_method("pissa", svd_iterations=None).adapter(W, site)
    assert torch.equal(pissa.A0, same.A0)
    plain, lora = (make_method(m, **o).adapter(W, site) for m, o in (("ba_lora", LORA), ("lora", {})))
    assert type(plain) is type(lora)
    assert torch.equal(plain.A, lora.A)
    assert (plain.pair().rank, pissa.pair().rank) == (4, 8)


LORA = {"init": "lora"}


@pytest.mark.parametrize("init", ["pissa", "lora"])
def test_its_card_is_its_default(init: str) -> None:
    adapter = read_spec(model="m", adapter={"method": "ba_lora", "init": init}).adapter
    assert isinstance(adapter, BALoRASpec)
    assert (adapter.rank, adapter.alpha, adapter.scale, adapter.dropout) == (16, 16, 1, 0)
    lambdas = (adapter.lambda_consistency, adapter.lambda_diversity, adapter.lambda_spectrum)
    assert lambdas == (0.025, 0.005, 0.005)
    assert (adapter.top_singular_values, adapter.top_tokens, adapter.temperature) == (10, 20, 2)
    assert adapter.pair_rank == (16 if init == "lora" else 32)
    spec = read_spec(model="m", adapter=adapter.model_dump())
    assert TrainSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_an_svd_is_refused_where_there_is_none() -> None:
    with pytest.raises(SpecError, match=r"must be .pissa. where svd_iterations is given") as caught:
        read_spec(model="m", adapter={"method": "ba_lora", "svd_iterations": 4, **LORA})
    assert caught.value.param == "adapter.init"


def test_decay_is_pointed_out_where_factors_hold_pretrained_weight() -> None:
    (note,) = make_method("ba_lora", weight_decay=0.01).notes
    assert "BA-LoRA's factors" in note
    assert make_method("ba_lora", weight_decay=0.01, **LORA).notes == []


# --- in a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "training.jsonl", chat_rows())


class Watched(BALoRA):
    """BA-LoRA, writing down what it is given and what it says."""

    def __init__(self, *args: Any, **run: Any) -> None:
        super().__init__(*args, **run)
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []
        Watched.last = self

    def penalty(self, outputs: Outputs, reference: Callable[[], Tensor]) -> Tensor | None:
        base = reference()
        said = super().penalty(outputs, lambda: base)
        assert said is not None
        self.seen.append((self.finished_steps, outputs.logits.detach(), base, said.detach()))
        return said


@pytest.mark.parametrize("init", ["pissa", "lora"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_first_penalty_of_a_run_is_nothing_and_the_reference_stays(
    llama, files, tmp_path, monkeypatch, init: str, packing: bool
) -> None:
    monkeypatch.setitem(methods.METHODS, "ba_lora", Watched)
    bare = copy.deepcopy(llama.model)
    spec = spec_for("ba_lora", adapter=LAMBDAS | {"init": init}, packing=packing, warmup_ratio=0.0)
    progress = list(train(spec, llama, files, None, tmp_path / "run"))
    assert progress[-1].certificate["passed"]
    seen = Watched.last.seen
    for step, own, base, said in seen:
        assert torch.equal(own, base) is (step == 0)
        assert (said == 0) == (step == 0)
    with torch.no_grad():
        assert all(
            torch.equal(p, q) for p, q in zip(llama.model.parameters(), bare.parameters(), strict=True)
        )


@pytest.mark.parametrize(("init", "plain"), [("pissa", "pissa"), ("lora", "lora")])
def test_without_weights_it_is_the_method_it_starts_from(llama, files, tmp_path, init, plain) -> None:
    runs = {}
    for method, options in (("ba_lora", NO_PENALTY | {"init": init}), (plain, {})):
        spec = spec_for(method, adapter=options)
        runs[method] = losses(train(spec, llama, files, None, tmp_path / method))
    files_of = [tmp_path / method / "adapter" / "adapter_model.safetensors" for method in runs]
    assert runs["ba_lora"] == runs[plain]
    assert files_of[0].read_bytes() == files_of[1].read_bytes()


def test_each_weight_moves_the_run_and_none_is_in_its_first_loss(llama, files, tmp_path) -> None:
    def run(**options: float) -> list[float]:
        spec = spec_for("ba_lora", adapter=NO_PENALTY | options)
        return losses(train(spec, llama, files, None, tmp_path / "-".join(options)))

    plain = run()
    for name in LAMBDAS:
        moved = run(**{name: 5.0})
        assert moved[0] == pytest.approx(plain[0], rel=1e-6)
        assert abs(moved[-1] - plain[-1]) > 1e-4


def test_consistency_keeps_a_run_nearer_the_base(llama, files, tmp_path, token_rows) -> None:
    with torch.no_grad():
        bare = llama.model(token_rows).logits.log_softmax(-1)
    distances = []
    for weight in (0.0, 20.0):
        options = NO_PENALTY | {"lambda_consistency": weight}
        spec = spec_for("ba_lora", adapter=options, learning_rate=1e-2, n_epochs=4)
        for _ in train(spec, llama, files, None, tmp_path / str(weight)):
            with torch.no_grad():  # while it is going on; afterwards the model is the base
                now = llama.model(token_rows).logits.log_softmax(-1)
        distances.append((bare.exp() * (bare - now)).sum().item())
    assert distances[1] < 0.8 * distances[0]
