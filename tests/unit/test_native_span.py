"""Layers of a decode step in one call, and rows of layers on a thread, against the separate calls: the same bits."""

import gc
import time
from collections.abc import Collection, Sequence

import pytest
import torch
from support import vector_arithmetic
from support.kernels import SETS, Experts, make_experts, make_linear
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native import kernels

HIDDEN, HEADS, DIM, CAPACITY, LENGTH = 128, 4, 32, 16, 5
NUM_EXPERTS, TOP_K, NUM_LAYERS = 6, 3, 3
SCALE, RESIDUAL_SCALE = 0.75, 0.3
pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")


class Layer:
    """A decoder layer of random weights, with its cache."""

    def __init__(self, number: int) -> None:
        torch.manual_seed(number)
        self.norms = (kernels.NormKernel(torch.rand(HIDDEN) + 0.5, 1e-3), kernels.NormKernel(torch.rand(HIDDEN), 1e-5))
        projections = [make_linear("int8", HEADS * DIM, HIDDEN) for _ in range(3)]
        self.attention = kernels.AttentionKernel(
            [*projections, make_linear("int8", HIDDEN, HEADS * DIM)], head_dim=DIM, rotated_dims=DIM, scaling=0.3
        )
        self.router = kernels.RouterKernel(make_linear("bf16", NUM_EXPERTS, HIDDEN), top_k=TOP_K, is_of_chosen=True)
        self.step = kernels.LayerKernel(self.norms, self.attention, self.router, RESIDUAL_SCALE)
        self.experts: Experts = make_experts("nf4", HIDDEN, 64 * (number + 1), count=NUM_EXPERTS)
        self.kernel = kernels.ExpertKernel("nf4", self.experts.shape, self.experts.layout, activation="silu")
        self.keys, self.values = (torch.randn(1, HEADS, CAPACITY, DIM) for _ in range(2))

    def separately(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Residual, normed, and what the router says."""
        normed, residual = torch.empty_like(x), torch.empty_like(x)
        self.norms[0].step(x, normed)
        self.attention.step(normed, cos, sin, [(self.keys, self.values, LENGTH)], residual)
        residual = x + RESIDUAL_SCALE * residual
        self.norms[1].step(residual, normed)
        routed = torch.empty(1, NUM_EXPERTS), torch.empty(1, TOP_K), torch.empty(1, TOP_K, dtype=torch.int64)
        self.router.step(normed, *routed)
        return residual, normed, routed

    def add_experts(self, residual: Tensor, normed: Tensor, routed: tuple[Tensor, ...]) -> Tensor:
        _, weights, ids = routed
        weight_of = dict(zip(ids[0].tolist(), (weights[0] * SCALE).tolist(), strict=True))
        chosen, out = sorted(weight_of), torch.empty_like(normed)
        addresses = [self.experts.records[expert].data_ptr() for expert in chosen]
        self.kernel.forward_token(normed, addresses, [weight_of[expert] for expert in chosen], out)
        return residual + RESIDUAL_SCALE * out


def rotary() -> tuple[Tensor, Tensor]:
    angles = torch.rand(DIM // 2, generator=torch.Generator().manual_seed(9))
    return torch.cat([angles.cos()] * 2), torch.cat((-angles.sin(), angles.sin()))


def one_token() -> Tensor:
    return torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("name", SETS)
def test_a_layer_is_its_parts(name: str) -> None:
    kernels.select_instruction_set(name)
    layer, x = Layer(0), one_token()
    residual, normed, routed = layer.separately(x, *rotary())
    got = torch.empty_like(x), torch.empty_like(x)
    said = torch.empty(1, NUM_EXPERTS), torch.empty(1, TOP_K), torch.empty(1, TOP_K, dtype=torch.int64)
    cache = layer.keys.clone(), layer.values.clone()
    layer.keys[0, :, LENGTH], layer.values[0, :, LENGTH] = 0, 0
    layer.step.step(x, *rotary(), [(layer.keys, layer.values, LENGTH)], *got, said)
    for ours, theirs in zip((*got, *said, layer.keys, layer.values), (residual, normed, *routed, *cache), strict=True):
        assert torch.equal(ours, theirs)


def test_a_layer_without_a_router_leaves_it_to_the_caller() -> None:
    layer, x = Layer(0), one_token()
    residual, normed, _ = layer.separately(x, *rotary())
    got = torch.empty_like(x), torch.empty_like(x)
    step = kernels.LayerKernel(layer.norms, layer.attention, None, RESIDUAL_SCALE)
    step.step(x, *rotary(), [(layer.keys, layer.values, LENGTH)], *got, None)
    assert torch.equal(got[0], residual)
    assert torch.equal(got[1], normed)


@pytest.mark.parametrize("has_gate", [True, False])
def test_a_shared_expert_is_added_as_much_as_its_gate_says(has_gate: bool) -> None:
    x = one_token()
    gate_proj, up_proj = make_linear("nf4", 64, HIDDEN), make_linear("nf4", 64, HIDDEN)
    kernel = kernels.MlpKernel(gate_proj, up_proj, make_linear("int8", HIDDEN, 64), activation="silu")
    gate = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.1 if has_gate else None
    out, alone = torch.randn(1, HIDDEN), torch.empty(1, HIDDEN)
    kernel.forward(x, alone)
    share = 1.0 if gate is None else float(vector_arithmetic.sigmoid(vector_arithmetic.dot(x[0].numpy(), gate.numpy())))
    expected = out + share * alone
    kernels.SharedKernel(kernel, gate).add(x, out)
    assert alone.norm() > 0.1
    assert gate is None or 0.1 < share < 0.9
    assert torch.equal(out, expected)


def slot_of(key: int) -> int:
    return NUM_LAYERS * NUM_EXPERTS - 1 - key


class Run:
    """A row of layers whose experts lie in slots in reverse order."""

    def __init__(self, ranks: Sequence[int] = (), absent: Collection[int] = ()) -> None:
        """absent: keys of experts that are not there."""
        self.layers = [Layer(number) for number in range(NUM_LAYERS)]
        runs = [
            kernels.SpanLayer(step=layer.step, experts=layer.kernel, first_key=number * NUM_EXPERTS, weight_scale=SCALE)
            for number, layer in enumerate(self.layers)
        ]
        self.kernel = kernels.SpanKernel(runs, hidden=HIDDEN, num_experts=NUM_EXPERTS, top_k=TOP_K)
        records = [record for layer in self.layers for record in layer.experts.records]
        self.addresses = [record.data_ptr() for record in reversed(records)]
        self.slot_table = kernels.SlotTable(len(records), len(records), self.addresses)
        for key in set(range(len(records))) - set(absent):
            self.bring(key)
        shape = {"num_experts": NUM_EXPERTS, "top_k": TOP_K}
        self.token = kernels.SpanRows(one_token(), self.rooms(), rotary(), **shape, ranks=ranks)

    def rooms(self) -> list[list[kernels.Room]]:
        return [[(layer.keys, layer.values, LENGTH)] for layer in self.layers]

    def bring(self, key: int) -> None:
        self.slot_table.admit(key, slot_of(key))
        self.slot_table.loaded(slot_of(key))

    def chosen(self, layer: int) -> list[int]:
        """Keys, once the router has spoken."""
        return [layer * NUM_EXPERTS + expert for expert in self.token.ids[layer].flatten().tolist()]

    def go(self) -> list[tuple[int, int]]:
        """Through all layers; what they needed, which is brought one by one, the last one first."""
        needs: list[tuple[int, int]] = []
        with self.kernel.start(self.token, self.slot_table) as token_pass:
            while (said := wait(token_pass, needs[-1][0] + 1 if needs else 0))[0] < NUM_LAYERS:
                needs.append(said)
                for key in reversed(self.chosen(said[0])):
                    time.sleep(0.002)
                    self.bring(key)
        return needs


def wait(token_pass: kernels.TokenPass, first: int) -> tuple[int, int]:
    """What it says next, within ten seconds."""
    for _ in range(100):
        said = token_pass.next(first)
        if said is not None:
            return said
    raise AssertionError("the token pass says nothing")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", SETS)
def test_a_run_is_its_layers(name: str, threads: int) -> None:
    kernels.select_instruction_set(name)
    kernels.set_threads(threads)
    run, x = Run(), one_token()
    said = []
    for layer in run.layers:
        residual, normed, routed = layer.separately(x, *rotary())
        x = layer.add_experts(residual, normed, routed)
        said.append(routed)
    assert len({tuple(routed[2][0].tolist()) for routed in said}) > 1
    assert run.go() == []
    assert torch.equal(run.token.x, x)
    for got, parts in zip((run.token.logits, run.token.weights, run.token.ids), zip(*said, strict=True), strict=True):
        assert torch.equal(got, torch.stack(parts))
    begins, ends = run.token.times.T
    assert (begins < ends).all()
    assert (ends[:-1] <= begins[1:]).all()
    assert not run.token.found.any()
    assert not run.token.stalls.any()


@pytest.mark.parametrize("num_missing", [1, 2, 3])
@pytest.mark.parametrize("name", SETS)
def test_what_is_missing_is_asked_for_once_and_waited_for(name: str, num_missing: int) -> None:
    kernels.select_instruction_set(name)
    whole = Run()
    assert whole.go() == []
    absent = whole.chosen(1)[:num_missing]
    run = Run(absent=[*absent, *whole.chosen(2)])
    assert run.go() == [(1, kernels.NEEDS_EXPERTS), (2, kernels.NEEDS_EXPERTS)]
    assert torch.equal(run.token.x, whole.token.x)
    assert run.token.found[1, 0].tolist() == [
        kernels.MISSING if key in absent else kernels.HIT for key in whole.chosen(1)
    ]
    assert run.token.stalls[0] == 0
    assert (run.token.stalls[1:] > 0).all()


def test_what_a_run_computes_with_cannot_be_withdrawn() -> None:
    whole = Run()
    whole.go()
    missing, *others = whole.chosen(1)
    run = Run(absent=[missing])
    with run.kernel.start(run.token, run.slot_table) as token_pass:
        assert wait(token_pass, 0) == (1, kernels.NEEDS_EXPERTS)
        assert all(run.slot_table.is_leased(key) and not run.slot_table.vacate(slot_of(key)) for key in others)
        assert all(run.slot_table.vacate(slot_of(key)) for key in run.chosen(0))
        run.bring(missing)
        assert wait(token_pass, 2) == (NUM_LAYERS, 0)
    assert torch.equal(run.token.x, whole.token.x)
    assert not any(run.slot_table.is_leased(key) for key in range(NUM_LAYERS * NUM_EXPERTS))


def test_a_ride_that_is_left_stops_where_it_waits() -> None:
    whole = Run()
    whole.go()
    run = Run(absent=whole.chosen(1)[:1])
    with run.kernel.start(run.token, run.slot_table) as token_pass:
        assert wait(token_pass, 0) == (1, kernels.NEEDS_EXPERTS)
        assert token_pass.next(2) is None
    assert not any(run.slot_table.is_leased(key) for key in range(NUM_LAYERS * NUM_EXPERTS))


def test_an_expert_is_admitted_once() -> None:
    slot_table, slot = Run(absent=[3]).slot_table, slot_of(3)
    assert not slot_table.admit(2, slot)
    assert slot_table.admit(3, slot)
    assert not slot_table.admit(3, slot)
    assert slot_table.vacate(slot)
    assert slot_table.admit(3, slot)


def test_a_table_that_grows_and_shrinks_keeps_its_slots() -> None:
    slot_table = kernels.SlotTable(4, 2)
    assert slot_table.admit(3, 1)
    slot_table.loaded(1)
    slot_table.resize(300)
    assert slot_table.admit(0, 299)
    assert slot_table.lease_arrived([0, 1, 2, 3]) == [3]
    assert not slot_table.vacate(1)
    slot_table.release([3])
    assert slot_table.vacate(1)
    assert slot_table.vacate(299)
    slot_table.resize(1)
    assert (slot_table.num_slots, [*slot_table.slots]) == (1, [-1] * 4)


def test_a_run_asks_the_next_layers_and_notes_what_was_there() -> None:
    run = Run(ranks=[TOP_K, TOP_K])
    assert run.go() == []
    token, x = run.token, one_token()
    for number, layer in enumerate(run.layers):
        residual, normed, routed = layer.separately(x, *rotary())
        x = layer.add_experts(residual, normed, routed)
        for ahead, other in enumerate(run.layers[number + 1 :]):
            normed = torch.empty_like(residual)
            other.norms[1].step(residual, normed)
            said = torch.empty(1, NUM_EXPERTS), torch.empty(1, TOP_K), torch.empty(1, TOP_K, dtype=torch.int64)
            other.router.step(normed, *said)
            assert torch.equal(token.guesses[number, ahead], said[2][0])
    assert torch.equal(token.x, x)
    assert not token.guesses_found.any()
    guessed = int(token.guesses[0, 0, 1])
    without = Run(ranks=[TOP_K], absent=[NUM_EXPERTS + guessed])
    without.go()
    assert without.token.guesses_found[0, 0].tolist() == [kernels.HIT, kernels.MISSING, kernels.HIT]


def test_a_run_takes_no_more_experts_than_it_has_room_for() -> None:
    with pytest.raises(ConfigError, match="64"):
        kernels.SpanKernel([], hidden=HIDDEN, num_experts=128, top_k=65)


class Dense:
    """A layer without a router, and its MLP."""

    def __init__(self, number: int) -> None:
        self.layer = Layer(number)
        self.step = kernels.LayerKernel(self.layer.norms, self.layer.attention, None, SCALE)
        linears = [make_linear("int8", *size) for size in ((96, HIDDEN), (96, HIDDEN), (HIDDEN, 96))]
        self.mlp = kernels.MlpKernel(*linears, activation="silu")

    def separately(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        residual, normed, out = (torch.empty_like(x) for _ in range(3))
        self.step.step(x, cos, sin, [(self.layer.keys, self.layer.values, LENGTH)], residual, normed, None)
        self.mlp.forward(normed, out)
        return residual + SCALE * out


@pytest.mark.parametrize("absent", [(), (1,)])
def test_dense_layers_are_a_part_of_a_run(absent: Collection[int]) -> None:
    """Before, between and behind those with experts, which are counted without them. absent: of all layers."""
    run = Run(ranks=[TOP_K])
    dense = [Dense(10 + number) for number in range(3)]
    first, second, third = run.layers
    order: list[Layer | Dense] = [dense[0], dense[1], first, second, dense[2], third]
    parts = [
        kernels.SpanLayer(step=each.step, dense=each.mlp)
        if isinstance(each, Dense)
        else kernels.SpanLayer(
            step=each.step, experts=each.kernel, first_key=run.layers.index(each) * NUM_EXPERTS, weight_scale=SCALE
        )
        for each in order
    ]
    run.kernel = kernels.SpanKernel(parts, hidden=HIDDEN, num_experts=NUM_EXPERTS, top_k=TOP_K)
    caches = [each.layer if isinstance(each, Dense) else each for each in order]
    rooms = [[(layer.keys, layer.values, LENGTH)] for layer in caches]
    shape = {"num_experts": NUM_EXPERTS, "top_k": TOP_K, "num_layers": NUM_LAYERS}
    run.token = kernels.SpanRows(one_token(), rooms, rotary(), **shape, ranks=[TOP_K])
    for layer in absent:
        for key in range(layer * NUM_EXPERTS, (layer + 1) * NUM_EXPERTS):
            assert run.slot_table.vacate(slot_of(key))
    assert run.go() == [(layer, kernels.NEEDS_EXPERTS) for layer in absent]
    x, said, guessed_from = one_token(), [], torch.empty(0)
    for each in order:
        if isinstance(each, Dense):
            x = each.separately(x, *rotary())
        else:
            residual, normed, routed = each.separately(x, *rotary())
            x = each.add_experts(residual, normed, routed)
            said.append(routed)
            guessed_from = residual if each is first else guessed_from
    assert torch.equal(run.token.x, x)
    for got, parts_of in zip(
        (run.token.logits, run.token.ids), zip(*(each[::2] for each in said), strict=True), strict=True
    ):
        assert torch.equal(got, torch.stack(parts_of))
    assert len(run.token.times) == NUM_LAYERS
    assert (run.token.stalls > 0).tolist() == [layer in absent for layer in range(NUM_LAYERS)]
    normed, said = torch.empty_like(x), [torch.empty_like(part) for part in said[0]]
    second.norms[1].step(guessed_from, normed)
    second.router.step(normed, *said)
    assert torch.equal(run.token.guesses[0, 0], said[2][0])


def test_rows_that_follow_replace_those_before() -> None:
    """And the memory of caches is not held any longer."""
    run, other = Run(), Run()
    x = one_token() * 2
    other.token = kernels.SpanRows(x.clone(), other.rooms(), rotary(), num_experts=NUM_EXPERTS, top_k=TOP_K)
    assert run.go() == other.go() == []
    assert not torch.equal(run.token.ids, other.token.ids)
    for layer, fresh in zip(run.layers, Run().layers, strict=True):
        layer.keys, layer.values = fresh.keys, fresh.values
    run.token.begin(x, run.rooms(), rotary())
    before = len(gc.get_referrers(run.layers[0].keys))
    assert run.go() == []
    run.token.end()
    assert len(gc.get_referrers(run.layers[0].keys)) < before
    for name in ("x", "logits", "weights", "ids", "found"):
        assert torch.equal(getattr(run.token, name), getattr(other.token, name)), name
