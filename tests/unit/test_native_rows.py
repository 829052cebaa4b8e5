"""Several rows in one call of a layer, and in one token pass: the bits of each row alone, in results and in caches."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from support.kernels import PANEL_SETS, make_experts, make_linear
from torch import Tensor

from offload_moe.errors import ConfigError
from offload_moe.native import kernels

HIDDEN, HEADS, DIM, CAPACITY = 128, 4, 32, 24
RANK, UNROTATED, VALUE = 48, 24, 20  # of latent attention
NUM_EXPERTS, TOP_K, NUM_LAYERS = 8, 3, 2
SEQUENCES = {"one sequence": [0] * 8, "several": [*range(8)], "both": [0, 0, 0, 1, 2, 2, 3, 3]}
pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the layers of a span are made of."""

    codec: str
    in_panels: bool = True
    is_latent: bool = False
    is_gpt_oss: bool = False
    has_shared: bool = False

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.in_panels else torch.float32


KINDS = {
    "plain nf4": Kind(codec="nf4"),
    "nf4 in row order": Kind(codec="nf4", in_panels=False),
    "gpt-oss": Kind(codec="mxfp4", is_gpt_oss=True),
    "latent, shared": Kind(codec="int8", is_latent=True, has_shared=True),
}


def panels(linear: kernels.Linear, kind: Kind) -> kernels.Linear:
    if not kind.in_panels:
        return linear
    kernels.PanelOrder(linear.codec, linear.shape, linear.layout).to_panels(linear.record)
    return replace(linear, in_panels=True)


def norm(length: int) -> kernels.HeadNorm:
    return kernels.HeadNorm(weight=torch.rand(length) + 0.5, epsilon=1e-4)


def grouped_attention(kind: Kind) -> kernels.AttentionKernel:
    sizes = [(HEADS * DIM, HIDDEN), *[(HEADS // 2 * DIM, HIDDEN)] * 2, (HIDDEN, HEADS * DIM)]
    return kernels.AttentionKernel(
        [panels(make_linear("int8", *size, has_bias=kind.is_gpt_oss), kind) for size in sizes],
        head_dim=DIM,
        rotated_dims=DIM,
        scaling=0.3,
        norms=(None, None) if kind.is_gpt_oss else (norm(DIM), norm(DIM)),
        sinks=torch.randn(HEADS) if kind.is_gpt_oss else None,
        cache_dtype=kind.cache_dtype,
    )


def latent_attention(kind: Kind) -> kernels.LatentKernel:
    expand = make_linear("bf16", HEADS * (UNROTATED + VALUE), RANK)
    inner = expand.record.view(HEADS, UNROTATED + VALUE, RANK)[:, :UNROTATED].transpose(1, 2).reshape(-1, UNROTATED)
    query = [(40, HIDDEN), (HEADS * (UNROTATED + DIM), 40)]
    return kernels.LatentKernel(
        query=[panels(make_linear("int8", *size), kind) for size in query],
        compress=make_linear("fp32", RANK + DIM, HIDDEN),
        inner=kernels.Linear.of_numbers(inner.contiguous()),
        expand=expand,
        output=panels(make_linear("int8", HIDDEN, HEADS * VALUE), kind),
        query_norm=norm(40),
        latent_norm=norm(RANK),
        rotated_dims=DIM,
        scaling=0.2,
        rotation="pairs",
        cache_dtype=kind.cache_dtype,
    )


def experts_of(kind: Kind, intermediate: int, count: int) -> tuple[kernels.ExpertKernel, list[Tensor]]:
    made = make_experts(kind.codec, HIDDEN, intermediate, count=count, has_bias=kind.is_gpt_oss)
    if kind.in_panels:
        order = kernels.PanelOrder(kind.codec, made.shape, made.layout, has_gate=True)
        for record in made.records:
            order.to_panels(record)
    activation = "gpt_oss" if kind.is_gpt_oss else "silu"
    settings = {"activation": activation, "in_panels": kind.in_panels}
    return kernels.ExpertKernel(kind.codec, made.shape, made.layout, **settings), made.records


class Decoder:
    """A few layers, and caches of several sequences of different lengths."""

    def __init__(self, kind: Kind, absent: Collection[int] = ()) -> None:
        """absent: keys of experts that are not there."""
        torch.manual_seed(7)
        self.kind = kind
        self.attentions, self.steps, layers, self.records = [], [], [], list[Tensor]()
        for number in range(NUM_LAYERS):
            attention = latent_attention(kind) if kind.is_latent else grouped_attention(kind)
            norms = kernels.NormKernel(torch.rand(HIDDEN) + 0.5, 1e-3), kernels.NormKernel(torch.rand(HIDDEN), 1e-5)
            linear = make_linear("bf16", NUM_EXPERTS, HIDDEN, has_bias=kind.is_gpt_oss)
            scored = {
                "is_sigmoid": True,
                "correction": torch.rand(NUM_EXPERTS),
                "num_groups": 4,
                "num_chosen_groups": 2,
            }
            router = kernels.RouterKernel(linear, top_k=TOP_K, is_of_chosen=True, **(scored if kind.is_latent else {}))
            step = kernels.LayerKernel(norms, attention, router, 0.5)
            expert, records = experts_of(kind, 64 * (number + 1), NUM_EXPERTS)
            self.records += records
            shared = None
            if kind.has_shared:
                sizes = [(40, HIDDEN), (40, HIDDEN), (HIDDEN, 40)]
                linears = [panels(make_linear(kind.codec, *size), kind) for size in sizes]
                mlp = kernels.MlpKernel(*linears, activation="silu")
                shared = kernels.SharedKernel(mlp, torch.randn(HIDDEN) * 0.1)
            self.steps.append(step)
            layers.append(
                kernels.SpanLayer(
                    step=step, experts=expert, shared=shared, first_key=number * NUM_EXPERTS, weight_scale=0.75
                )
            )
        self.span = kernels.SpanKernel(layers, hidden=HIDDEN, num_experts=NUM_EXPERTS, top_k=TOP_K)
        self.slot_table = kernels.SlotTable(
            len(self.records), len(self.records), [record.data_ptr() for record in self.records]
        )
        for key in set(range(len(self.records))) - set(absent):
            self.bring(key)
        self.caches = [[self._cache() for _ in range(NUM_LAYERS)] for _ in range(8)]
        self.lengths = [5 + 2 * number for number in range(8)]

    def _cache(self) -> tuple[Tensor, Tensor]:
        shapes = ((1, RANK), (1, DIM)) if self.kind.is_latent else ((HEADS // 2, DIM),) * 2
        keys, values = (torch.randn(1, heads, CAPACITY, dim).to(self.kind.cache_dtype) for heads, dim in shapes)
        return keys, values

    def bring(self, key: int) -> None:
        self.slot_table.admit(key, key)
        self.slot_table.loaded(key)

    def rooms(self, sequences: Sequence[int]) -> list[list[kernels.Room]]:
        """Of each layer, for the next tokens of these sequences, which count afterwards."""
        lengths = []
        for sequence in sequences:
            lengths.append(self.lengths[sequence])
            self.lengths[sequence] += 1
        rows = list(zip(sequences, lengths, strict=True))
        return [[(*self.caches[sequence][layer], at) for sequence, at in rows] for layer in range(NUM_LAYERS)]

    def rows(self, x: Tensor, sequences: Sequence[int], ranks: Sequence[int] = ()) -> kernels.SpanRows:
        rooms = self.rooms(sequences)
        positions = torch.tensor([float(room[2]) for room in rooms[0]])
        shape = {"num_experts": NUM_EXPERTS, "top_k": TOP_K}
        return kernels.SpanRows(x.clone(), rooms, rotary(positions), **shape, ranks=ranks)

    def pass_through(self, x: Tensor, sequences: Sequence[int]) -> kernels.SpanRows:
        rows = self.rows(x, sequences)
        self.span.pass_through(rows, self.slot_table)
        return rows

    def alone(self, x: Tensor, sequences: Sequence[int]) -> dict[str, Tensor]:
        """Each row in a pass of its own, in their order."""
        passed = [self.pass_through(x[t : t + 1], [sequence]) for t, sequence in enumerate(sequences)]
        names = ("logits", "weights", "ids")
        return {
            "x": torch.cat([rows.x for rows in passed]),
            **{name: torch.cat([getattr(rows, name) for rows in passed], 1) for name in names},
        }

    def cached(self) -> list[Tensor]:
        return [part.clone() for sequence in self.caches for cache in sequence for part in cache]


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[:, None] * torch.linspace(1.0, 0.1, DIM // 2)
    return torch.cat([angles.cos()] * 2, 1), torch.cat((-angles.sin(), angles.sin()), 1)


def some_rows(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(8))


def check(decoder: Decoder, rows: kernels.SpanRows, expected: dict[str, Tensor], caches: list[Tensor]) -> None:
    for name, wanted in expected.items():
        assert torch.equal(getattr(rows, name), wanted), name
    for got, wanted in zip(decoder.cached(), caches, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("arrangement", SEQUENCES)
@pytest.mark.parametrize("name", KINDS)
def test_rows_have_the_bits_of_each_alone(name: str, arrangement: str, num_threads: int) -> None:
    kernels.set_threads(num_threads)
    for count in (1, 2, 3, 5, 8):
        x, sequences = some_rows(count), SEQUENCES[arrangement][-count:]
        alone, together = Decoder(KINDS[name]), Decoder(KINDS[name])
        expected = alone.alone(x, sequences)
        assert count < 8 or len({tuple(row) for row in expected["ids"][0].tolist()}) > 2
        assert expected["x"].norm() > 1
        check(together, together.pass_through(x, sequences), expected, alone.cached())


@pytest.mark.parametrize("instruction_set", PANEL_SETS)
@pytest.mark.parametrize("name", ["plain nf4", "latent, shared"])
def test_every_set_gives_the_bits_of_each_row_alone(name: str, instruction_set: str) -> None:
    kernels.select_instruction_set(instruction_set)
    x, sequences = some_rows(5), SEQUENCES["both"][:5]
    alone, together = Decoder(KINDS[name]), Decoder(KINDS[name])
    expected = alone.alone(x, sequences)
    check(together, together.pass_through(x, sequences), expected, alone.cached())


def test_a_row_sees_those_before_it_and_none_behind_it() -> None:
    x = some_rows(3)
    first = Decoder(KINDS["plain nf4"]).pass_through(x, [0, 0, 0])
    changed = x.clone()
    changed[1] *= -1
    second = Decoder(KINDS["plain nf4"]).pass_through(changed, [0, 0, 0])
    assert torch.equal(first.x[0], second.x[0])
    assert not torch.equal(first.x[2], second.x[2])
    assert (first.logits[0, 2] - second.logits[0, 2]).norm() > 0.01


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_long_contexts_are_merged_from_sections(name: str) -> None:
    """Beyond one section of positions; the rows of different sequences have different numbers of them."""
    x, sequences = some_rows(4), [0, 0, 1, 2]
    made = []
    for _ in range(2):
        decoder = Decoder(KINDS[name])
        for sequence, length in enumerate((1100, 511, 3)):
            decoder.lengths[sequence] = length
            decoder.caches[sequence] = [
                tuple(part.repeat(1, 1, 50, 1) for part in cache) for cache in decoder.caches[sequence]
            ]
        made.append(decoder)
    alone, together = made
    expected = alone.alone(x, sequences)
    check(together, together.pass_through(x, sequences), expected, alone.cached())


def needs_of(decoder: Decoder, rows: kernels.SpanRows) -> list[tuple[int, int]]:
    """Take the rows through; bring what is needed one by one, the last one first."""
    needs: list[tuple[int, int]] = []
    with decoder.span.start(rows, decoder.slot_table) as token_pass:
        for _ in range(100):
            need = token_pass.next(needs[-1][0] + 1 if needs else 0)
            if need is None:
                continue
            if need[0] == NUM_LAYERS:
                return needs
            needs.append(need)
            for expert in sorted({*rows.ids[need[0]].flatten().tolist()}, reverse=True):
                time.sleep(0.001)
                decoder.bring(need[0] * NUM_EXPERTS + expert)
    raise AssertionError("the token pass does not end")


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_missing", [1, 3, 100])
@pytest.mark.parametrize("name", KINDS)
def test_experts_that_come_late_change_no_bit(name: str, num_missing: int, num_threads: int) -> None:
    kernels.set_threads(num_threads)
    x, sequences = some_rows(5), SEQUENCES["both"][:5]
    whole = Decoder(KINDS[name])
    expected = whole.alone(x, sequences)
    chosen = sorted({*expected["ids"][1].flatten().tolist()})
    missing = chosen[-num_missing:]
    decoder = Decoder(KINDS[name], absent=[NUM_EXPERTS + expert for expert in missing])
    rows = decoder.rows(x, sequences)
    assert needs_of(decoder, rows) == [(1, kernels.NEEDS_EXPERTS)]
    check(decoder, rows, expected, whole.cached())
    how = [
        [kernels.MISSING if expert in missing else kernels.HIT for expert in row] for row in expected["ids"][1].tolist()
    ]
    assert rows.found[1].tolist() == how
    assert not any(decoder.slot_table.is_leased(key) for key in range(NUM_LAYERS * NUM_EXPERTS))


def test_routers_are_evaluated_ahead_for_the_last_row() -> None:
    x = some_rows(3)
    decoder, alone = Decoder(KINDS["plain nf4"]), Decoder(KINDS["plain nf4"])
    rows = decoder.rows(x, [0, 1, 2], ranks=[TOP_K])
    decoder.span.pass_through(rows, decoder.slot_table)
    last = alone.rows(x[2:], [2], ranks=[TOP_K])
    alone.span.pass_through(last, alone.slot_table)
    assert torch.equal(rows.guesses[0], last.guesses[0])


def test_a_layer_takes_rows_without_a_span() -> None:
    x, sequences = some_rows(4), [0, 0, 1, 2]
    results = []
    for groups in ([range(4)], [range(t, t + 1) for t in range(4)]):
        decoder, parts = Decoder(KINDS["gpt-oss"]), []
        for group in groups:
            (rooms, _), count = decoder.rooms([sequences[t] for t in group]), len(group)
            turn = rotary(torch.tensor([float(room[2]) for room in rooms]))
            got = [torch.empty(count, HIDDEN), torch.empty(count, HIDDEN), torch.empty(count, NUM_EXPERTS)]
            got += [torch.empty(count, TOP_K), torch.empty(count, TOP_K, dtype=torch.int64)]
            decoder.steps[0].step(x[[*group]], *turn, rooms, got[0], got[1], (got[2], got[3], got[4]))
            parts.append(got)
        results.append([torch.cat(each) for each in zip(*parts, strict=True)] + decoder.cached())
    for together, alone in zip(*results, strict=True):
        assert torch.equal(together, alone)


def test_more_rows_than_a_tile_are_refused() -> None:
    decoder = Decoder(KINDS["plain nf4"])
    with pytest.raises(ConfigError, match="no more than 8 rows"):
        decoder.rows(some_rows(9), [0] * 9)
