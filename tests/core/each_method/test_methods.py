"""What every method promises, in one table; then what LoRA and OLoRA promise alone."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from olora_core.bases.sites import target_sites
from olora_core.errors import ModelError, SpecError
from olora_core.layers.adapter import Adapter, Site, adapters_off, detach
from olora_core.methods import METHODS, Method, Outputs, build_adapters
from olora_core.methods.base import generator
from olora_core.methods.lora import LoRA
from olora_core.methods.olora import OLoRA, OLoRAAdapter, qr_factors
from olora_core.specs import ADAPTER_SPECS, read_spec
from olora_core.specs.methods.lora import LoRASpec
from olora_core.specs.methods.olora import OLoRASpec
from tests.tiny_base import make_gpt2, make_llama

from ..runs import OPTIONS

# PEFT looks at a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ADDS_LOSS = {"ba_lora", "rm_lora", "adalora"}
BASES = {"linear": make_llama, "conv1d": make_gpt2}
LEARNING_RATES = {"adalora": 0.1}
"""Where five steps at 0.01 teach too little."""
GROUPS = {"sora": 2}
"""Optimizer groups; the others have one."""
GATED = ("sora", "adalora")
"""Train one number more for each component."""


TOO_WIDE = {"prilora": 66}
"""Ranks that no layer here holds in its first block, where they are not 33."""
WIDEST = dict.fromkeys(("olora", "pissa", "melora", "ba_lora"), 256) | {"prilora": 341, "cola": 170}
"""Ranks whose exact pair servers load, where they are not 512."""


AT_START = {"cola": 4}
"""Rank of the first pair, where it is not the last one's."""
OWN_SCHEDULE = {"cola"}
"""Methods that write the whole multiplier of the rate."""


def make_method(name: str, *, seed: int = 0, weight_decay: float = 0.0, **options: object) -> Method:
    spec = ADAPTER_SPECS[name](**{"rank": 4, "alpha": 6, "dropout": 0.0} | OPTIONS.get(name, {}) | options)
    return METHODS[name](
        spec, seed=seed, total_steps=10, schedule=lambda i, n: 1.0, weight_decay=weight_decay
    )


def adapted(model: PreTrainedModel, method: Method) -> dict[str, Adapter]:
    model.requires_grad_(False)
    return build_adapters(method, model, target_sites(model, "auto"))


def numbers_of(method: str, adapter: Adapter, r: int = 4) -> int:
    """What the method's card counts for one layer."""
    if method == "tt_lora":
        modes = {16: (16,), 32: (2, 16), 48: (4, 12), 96: (8, 12), 128: (8, 16)}
        sides = [modes[size] for size in (adapter.in_features, adapter.out_features)]
        return sum(r * r * sum(inner) + r * end for *inner, end in sides)
    if method == "mora":
        return mora_side(adapter, r) ** 2
    return r * (adapter.in_features + adapter.out_features + (method in GATED))


def mora_side(adapter: Adapter, r: int = 4) -> int:
    """The whole number whose square is nearest to LoRA's count."""
    numbers = r * (adapter.in_features + adapter.out_features)
    return min(range(1, numbers + 1), key=lambda side: abs(side - math.sqrt(numbers)))


def widest_pair(method: Method, adapters: dict[str, Adapter]) -> int:
    """Rank of the widest pair at the start."""
    if method.spec.method == "mora":
        return max(mora_side(adapter) for adapter in adapters.values())
    return AT_START.get(method.spec.method, method.spec.pair_rank)


def randomise(adapters: dict[str, Adapter], size: float = 0.05) -> None:
    """Random values in all trained tensors, as training would leave them."""
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for adapter in adapters.values():
            for parameter in adapter.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=draw))


def train_briefly(
    model: PreTrainedModel, adapters: dict[str, Adapter], method: Method, rows: Tensor
) -> list[float]:
    rate = LEARNING_RATES.get(method.spec.method, 1e-2)
    optimizer = torch.optim.AdamW(method.param_groups(adapters), lr=rate)
    losses = []
    for step in range(1, 6):
        loss = model(rows, labels=rows).loss
        loss.backward()
        method.after_backward(step)
        optimizer.step()
        method.after_step(step, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(params=METHODS)
def method_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BASES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return BASES[request.param]()


# --- promises of every method ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_starts_as_the_base_bit_for_bit(
    method_name: str,
    model: PreTrainedModel,
    token_rows: Tensor,
    dtype: torch.dtype,
    training: bool,
    dropout: float,
) -> None:
    model.to(dtype).train(training)
    before = model(token_rows).logits
    adapters = adapted(model, make_method(method_name, dropout=dropout))
    assert len(adapters) == len(target_sites_of(model))
    assert torch.equal(model(token_rows).logits, before)


def target_sites_of(model: PreTrainedModel) -> list[Site]:
    bare = copy.deepcopy(model)
    detach(bare)
    return target_sites(bare, "auto")


def test_it_starts_as_the_base_under_autocast(
    method_name: str, model: PreTrainedModel, token_rows: Tensor
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        before = model(token_rows).logits
        adapters = adapted(model, make_method(method_name))
        logits = model(token_rows).logits
        assert torch.equal(logits, before)
        F.cross_entropy(logits.flatten(0, 1).float(), token_rows.flatten()).backward()
    for adapter in adapters.values():
        assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


def test_training_learns_and_leaves_the_base_untouched(
    method_name: str, model: PreTrainedModel, token_rows: Tensor
) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    logits = model(token_rows).logits
    method = make_method(method_name)
    adapters = adapted(model, method)
    losses = train_briefly(model, adapters, method, token_rows)
    assert losses[-1] < losses[0] - 0.1
    with adapters_off(model):
        assert torch.equal(model(token_rows).logits, logits)
    detach(model)
    assert torch.equal(model(token_rows).logits, logits)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_delta_is_its_dense_matrix_applied(method_name: str, model: PreTrainedModel) -> None:
    adapters = adapted(model, make_method(method_name))
    randomise(adapters)
    assert any(a.out_features != a.in_features for a in adapters.values())
    for adapter in adapters.values():
        for shape in [(7, adapter.in_features), (2, 3, adapter.in_features)]:
            x = torch.randn(shape)
            dense = adapter.delta_weight()
            assert dense.shape == (adapter.out_features, adapter.in_features)
            torch.testing.assert_close(adapter.delta(x), x @ dense.T, rtol=1e-5, atol=1e-5)


def test_the_pair_is_the_update(method_name: str, model: PreTrainedModel) -> None:
    method = make_method(method_name)
    adapters = adapted(model, method)
    randomise(adapters)
    widest = widest_pair(method, adapters)
    for adapter in adapters.values():
        pair = adapter.pair()
        assert pair.rank <= widest
        assert {pair.A.dtype, pair.B.dtype} == {torch.float32}
        of_delta = adapter.delta(torch.eye(adapter.in_features)).T
        torch.testing.assert_close(pair.B @ pair.A, of_delta, rtol=1e-5, atol=1e-6)
    assert max(adapter.pair().rank for adapter in adapters.values()) == widest


def test_it_trains_what_its_card_counts_and_nothing_else(
    method_name: str, model: PreTrainedModel, token_rows: Tensor
) -> None:
    adapters = adapted(model, make_method(method_name))
    counted = sum(p.numel() for adapter in adapters.values() for p in adapter.parameters())
    assert counted == sum(numbers_of(method_name, a) for a in adapters.values())
    model(token_rows, labels=token_rows).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    trained = {name for name, _ in model.named_parameters() if ".adapter." in name}
    assert with_gradient == trained
    assert {p.dtype for a in adapters.values() for p in a.state_dict().values()} == {torch.float32}


def test_draws_depend_on_seed_and_name_alone_and_leave_the_global_generator(
    method_name: str, model: PreTrainedModel
) -> None:
    state = torch.get_rng_state()
    adapters = adapted(model, make_method(method_name, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    detach(model)
    again = adapted(model, make_method(method_name, seed=3))
    for name, adapter in adapters.items():
        for key, tensor in adapter.state_dict().items():
            assert torch.equal(tensor, again[name].state_dict()[key])


def test_a_rank_wider_than_a_layer_is_refused_by_name(method_name: str, model: PreTrainedModel) -> None:
    rank = TOO_WIDE.get(method_name, 33)
    with pytest.raises(SpecError, match=rf"adapter\.rank = {rank} .*'.*\.0\..*' \(.*×.*\).*at most"):
        adapted(model, make_method(method_name, rank=rank))


def test_a_rank_that_no_server_loads_is_refused_before_training(method_name: str) -> None:
    widest = WIDEST.get(method_name, 512)
    make_method(method_name, rank=widest)
    with pytest.raises(SpecError, match=rf"rank up to {widest}.*export_rank"):
        make_method(method_name, rank=widest + 1)
    make_method(method_name, rank=widest + 1, export_rank=512)
    with pytest.raises(SpecError, match="export_rank = 513"):
        make_method(method_name, export_rank=513)


def test_such_a_rank_is_refused_when_the_job_is_asked_for() -> None:
    with pytest.raises(SpecError, match="rank up to 256") as caught:
        read_spec(model="m", adapter={"method": "olora", "rank": 257})
    assert caught.value.param == "adapter.rank"
    assert read_spec(model="m", adapter={"rank": 257, "export_rank": 64}).adapter.export_rank == 64


def test_finished_steps_survive_a_save(method_name: str, model: PreTrainedModel, token_rows: Tensor) -> None:
    method = make_method(method_name)
    adapters = adapted(model, method)
    train_briefly(model, adapters, method, token_rows)
    fresh = make_method(method_name)
    fresh.load_state_dict(method.state_dict())
    assert fresh.finished_steps == 5


@pytest.mark.parametrize("method_name", [name for name in METHODS if name not in ADDS_LOSS])
def test_it_adds_no_loss_unless_it_says_so(method_name: str) -> None:
    outputs = Outputs(logits=None, labels=torch.zeros(1, 1), loss=torch.zeros(()))

    def reference() -> Tensor:
        raise AssertionError("the base's logits are not needed")

    assert make_method(method_name).penalty(outputs, reference) is None


def test_factors_carry_the_jobs_decay_and_the_plain_rate(method_name: str, model: PreTrainedModel) -> None:
    method = make_method(method_name, weight_decay=0.1)
    adapters = adapted(model, method)
    lr_by = "method" if method_name in OWN_SCHEDULE else "job"
    groups = method.param_groups(adapters)
    assert len(groups) == GROUPS.get(method_name, 1)
    grouped = [p for group in groups for p in group.pop("params")]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {p for a in adapters.values() for p in a.parameters()}
    assert groups[0] == {"weight_decay": 0.1, "lr_multiplier": 1.0, "lr_factor": 1.0, "lr_by": lr_by}


def test_a_layer_that_is_used_twice_gets_both_gradients(method_name: str) -> None:
    method = make_method(method_name)
    layer = nn.Linear(12, 12, bias=False).requires_grad_(False)
    site = Site("layer", None, 0, "linear", 12, 12)
    adapter = method.adapter(layer.weight, site)
    randomise({"layer": adapter})
    x = torch.randn(5, 12, dtype=torch.float64)

    def twice(change: Tensor) -> Tensor:
        W = layer.weight.double() + change
        return (x @ W.T) @ W.T

    exact = copy.deepcopy(adapter).double()
    twice(exact.delta_weight()).square().sum().backward()
    once = layer(x.float()) + adapter.delta(x.float())
    (layer(once) + adapter.delta(once)).square().sum().backward()
    for mine, theirs in zip(adapter.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)


def test_small_weights_are_read_by_one_thread_and_large_ones_by_all(monkeypatch) -> None:
    threads = {}

    def counted(method: LoRA, weight: Tensor, site: Site) -> Adapter:
        threads[site.name] = torch.get_num_threads()
        return build(method, weight, site)

    build = LoRA.adapter
    monkeypatch.setattr(LoRA, "adapter", counted)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(1024, 1024))
    sites = [Site("0", None, 0, "linear", 64, 64), Site("1", None, 0, "linear", 1024, 1024)]
    torch.set_num_threads(2)
    try:
        build_adapters(make_method("lora"), model, sites)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads == {"0": 1, "1": 2}


# --- LoRA --------------------------------------------------------------------------------------------------


def lora_adapter(weight: Tensor, *, seed: int = 0, name: str = "layer", **options: object) -> Adapter:
    method = LoRA(LoRASpec(**{"rank": 4} | options), seed=seed, total_steps=1, schedule=lambda i, n: 1.0)
    return method.adapter(weight, Site(name, None, 0, "linear", *weight.shape))


def test_lora_draws_a_as_kaiming_uniform_and_b_as_zero() -> None:
    adapter = lora_adapter(torch.zeros(30, 400), rank=16)
    bound = 1 / math.sqrt(400)
    assert adapter.A.abs().max() <= bound
    assert adapter.A.abs().max() > 0.99 * bound
    assert adapter.A.var().item() == pytest.approx(1 / (3 * 400), rel=0.05)
    assert not adapter.B.any()


def test_lora_draws_differ_between_layers_and_seeds() -> None:
    W = torch.zeros(8, 8)
    here, there, other = (
        lora_adapter(W, name="here").A,
        lora_adapter(W, name="there").A,
        lora_adapter(W, name="here", seed=1).A,
    )
    assert not torch.equal(here, there)
    assert not torch.equal(here, other)


def test_draws_are_the_same_in_every_process() -> None:
    """Numbers written down from another process: a salted hash would not give them again."""
    drawn = torch.randint(0, 2**31, (4,), generator=generator(5, 2, "a.b"))
    assert drawn.tolist() == [323583916, 394087759, 1795106714, 1995513561]


def test_only_b_of_lora_has_a_gradient_at_the_first_step() -> None:
    adapter = lora_adapter(torch.zeros(6, 5))
    adapter.delta(torch.randn(3, 5)).square().sum().backward()
    assert not adapter.A.grad.any()
    adapter.delta(torch.randn(3, 5)).sum().backward()
    assert adapter.B.grad.any()


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_lora_equals_pefts_from_the_same_factors(rslora: bool, scale: float, token_rows: Tensor) -> None:
    theirs = get_peft_model(
        make_llama(),
        LoraConfig(r=4, lora_alpha=16, use_rslora=rslora, target_modules=["q_proj", "down_proj"]),
    )
    model = make_llama()
    method = make_method("lora", rank=4, alpha=16, rslora=rslora)
    assert method.spec.scale == scale
    adapters = build_adapters(method, model, target_sites(model, ["q_proj", "down_proj"]))
    randomise(adapters)
    with torch.no_grad():
        for name, adapter in adapters.items():
            layer = theirs.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.A)
            layer.lora_B["default"].weight.copy_(adapter.B)
    torch.testing.assert_close(model(token_rows).logits, theirs(token_rows).logits, rtol=1e-5, atol=1e-5)


# --- OLoRA -------------------------------------------------------------------------------------------------

SHAPES = [(8, 8), (40, 24), (24, 40), (257, 64), (64, 300)]


def peft_olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B0 and A0 as PEFT makes them for one layer with this weight."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data = weight.clone()
    wrapped = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="olora", target_modules=["0"])
    )
    layer = wrapped.base_model.model[0]
    return layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_olora_starts_from_pefts_factors_signs_included(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    for rank in (1, 5, 8):
        B0, A0 = qr_factors(weight, rank)
        their_B, their_A = peft_olora(weight.float(), rank)
        torch.testing.assert_close(B0, their_B, rtol=0, atol=1e-5)
        torch.testing.assert_close(A0, their_A, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_factors_are_those_of_a_full_qr_in_float64(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    Q, R = torch.linalg.qr(weight)
    for given in (weight, weight.float()):
        B0, A0 = qr_factors(given, 8)
        assert {B0.dtype, A0.dtype} == {torch.float32}
        torch.testing.assert_close(B0.double(), Q[:, :8], rtol=0, atol=1e-5)
        torch.testing.assert_close(A0.double(), R[:8], rtol=0, atol=1e-5)
        assert not A0[:, :8].tril(-1).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_starts_from_the_projection_on_the_first_columns(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    B0, A0 = qr_factors(weight, 6)
    torch.testing.assert_close(B0.T @ B0, torch.eye(6), rtol=0, atol=1e-6)
    torch.testing.assert_close((B0 @ A0)[:, :6], weight[:, :6], rtol=0, atol=1e-5)


def test_the_widest_rank_reproduces_the_whole_weight() -> None:
    weight = torch.randn(12, 12)
    B0, A0 = qr_factors(weight, 12)
    torch.testing.assert_close(B0 @ A0, weight)


def olora_adapter(weight: Tensor, **options: object) -> OLoRAAdapter:
    method = OLoRA(
        OLoRASpec(**{"rank": 4, "alpha": 6} | options),
        seed=0,
        total_steps=1,
        schedule=lambda i, n: 1.0,
    )
    return method.adapter(weight, Site("layer", None, 0, "linear", *weight.shape))


@pytest.fixture
def moved() -> Iterator[OLoRAAdapter]:
    """An adapter 24×40 whose factors have moved from their start."""
    adapter = olora_adapter(torch.randn(24, 40, generator=torch.Generator().manual_seed(4)))
    randomise({"": adapter}, 0.1)
    return adapter


def two_branches(adapter: OLoRAAdapter, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """The paper's formula, `s (B (A x) − B0 (A0 x))`, in float64."""
    A0, B0 = adapter.A0.double(), adapter.B0.double()
    return 6 / 4 * (x @ A.T @ B.T - x @ A0.T @ B0.T)


def test_olora_pair_and_delta_are_the_papers_formula(moved: OLoRAAdapter) -> None:
    x = torch.randn(9, 40, dtype=torch.float64)
    expected = two_branches(moved, moved.A.double(), moved.B.double(), x)
    pair = moved.pair()
    torch.testing.assert_close(x @ pair.A.double().T @ pair.B.double().T, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.delta(x.float()).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_olora_gradients_are_exact(moved: OLoRAAdapter, dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 40, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 9, 24, dtype=torch.float64)
    A, B = (p.detach().double().requires_grad_() for p in (moved.A, moved.B))
    two_branches(moved, A, B, x).backward(g)
    if dtype == torch.float64:
        moved.double()
    mine = x.detach().to(dtype).requires_grad_()
    moved.delta(mine).backward(g.to(dtype))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for got, exact in [(moved.A.grad, A.grad), (moved.B.grad, B.grad), (mine.grad, x.grad)]:
        assert (got.double() - exact).norm() <= tolerance * exact.norm()


def test_olora_in_bf16_does_not_drown_a_small_update() -> None:
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(5)) / 16
    adapter = olora_adapter(W, rank=32, alpha=32)
    randomise({"": adapter}, 1e-4)
    change = adapter.delta_weight()
    assert change.norm() < 0.01 * W.norm()
    x = torch.randn(64, 256).bfloat16()
    exact = x.double() @ change.double().T
    error = (adapter.delta(x).double() - exact).norm() / exact.norm()
    two_branch = x @ adapter.A.bfloat16().T @ adapter.B.bfloat16().T
    two_branch = two_branch - x @ adapter.A0.bfloat16().T @ adapter.B0.bfloat16().T
    assert error < 0.01
    assert (two_branch.double() - exact).norm() / exact.norm() > 5 * error


def test_one_dropout_draw_feeds_both_terms_of_olora(moved: OLoRAAdapter) -> None:
    moved.dropout = 0.5
    moved.train()
    x = torch.ones(200, 40)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(1)
    expected = two_branches(moved, moved.A.double(), moved.B.double(), dropped.double())
    torch.testing.assert_close(moved.delta(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_decay_on_olora_is_pointed_out() -> None:
    assert make_method("olora").notes == []
    (note,) = make_method("olora", weight_decay=0.01).notes
    assert "weight_decay" in note
    assert make_method("lora", weight_decay=0.01).notes == []


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    for place_of_nan in [(0, 0), (5, 39)]:
        weight = torch.randn(24, 40)
        weight[place_of_nan] = float("nan")
        with pytest.raises(ModelError, match="'layer' is not finite"):
            olora_adapter(weight)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_loss_falls_as_with_pefts_olora_step_by_step(token_rows: Tensor, rslora: bool) -> None:
    """PEFT moves the start into W; y and both gradients are the same functions."""
    targets = ["q_proj", "o_proj", "down_proj"]
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, init_lora_weights="olora", target_modules=targets
    )
    theirs = get_peft_model(make_llama(), config)
    mine = make_llama().requires_grad_(False)
    build_adapters(make_method("olora", rslora=rslora), mine, target_sites(mine, targets))

    got, expected = sgd_losses(mine, token_rows), sgd_losses(theirs, token_rows)
    assert expected[-1] < expected[0] - 0.1
    assert got == pytest.approx(expected, rel=1e-5)


def sgd_losses(model: nn.Module, token_rows: Tensor) -> list[float]:
    """Of 20 steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    seen = []
    for _ in range(20):
        loss = model(input_ids=token_rows, labels=token_rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


# --- where PEFT's OLoRA goes wrong, ours does not -----------------------------------------------------------


def test_peft_mutates_its_base_and_does_not_give_it_back(token_rows: Tensor) -> None:
    """The reference behaves as we say it does; should PEFT change, this tells us."""
    model = make_llama()
    before = model(token_rows).logits
    theirs = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=4, init_lora_weights="olora", target_modules=["q_proj"])
    )
    with theirs.disable_adapter():
        assert (theirs(token_rows).logits - before).abs().max() > 0.01


def test_two_adapters_in_turn_on_one_base_start_from_the_same_factors(token_rows: Tensor) -> None:
    model = make_llama()
    first = adapted(model, make_method("olora"))
    train_briefly(model, first, make_method("olora"), token_rows)
    detach(model)
    second = adapted(model, make_method("olora"))
    for name, adapter in second.items():
        assert torch.equal(adapter.A0, first[name].A0)
        assert torch.equal(adapter.B0, first[name].B0)


def test_a_square_conv1d_is_factored_the_right_way_round(token_rows: Tensor) -> None:
    """PEFT forgets the transpose; a square layer then starts wrong without a word."""
    model = make_gpt2()
    adapters = adapted(model, make_method("olora"))
    name = "transformer.h.0.attn.c_proj"
    W = model.get_submodule(name).weight.T
    Q, R = torch.linalg.qr(W.double())
    torch.testing.assert_close(adapters[name].B0.double(), Q[:, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(adapters[name].A0.double(), R[:4], rtol=0, atol=1e-5)
