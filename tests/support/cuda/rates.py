"""What a card reaches: bytes per second of every kernel that reads weights or caches, launches, fetches, flags.

Real sizes, in memory of the card that is full of zeros; only the driver and the native library are needed. On the fake
driver sizes are tiny, everything runs once, and no figure means anything.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from offload_moe.card.launches import launch
from offload_moe.card.linears import card_matrix
from offload_moe.card.nodes import Nodes
from offload_moe.card.program import Program
from offload_moe.card.structs import constant, struct
from offload_moe.native.planes import matrix_struct
from offload_moe.native.session import SharedMemory
from offload_moe.quant import ExpertShape, Matrix, get_codec
from offload_moe.quant.layout import round_up
from tests.support.cuda.direct import Direct

CODECS = ("nf4", "int8", "mxfp4")
NODES = 60  # of one graph; `om_card_graph` takes 64
TRIALS = 5
TOUCHED_BYTES = 512 << 20  # that a graph reads: more than any card's L2 cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """hidden, inner, top_k: of experts. outs: rows of a projection. context: tokens that heads attend to."""

    hidden: int = 2048
    inner: int = 768
    top_k: int = 8
    outs: int = 4096
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    context: int = 8192
    touched_bytes: int = TOUCHED_BYTES
    repeats: int = 20


TINY = Sizes(
    hidden=128, inner=64, top_k=2, outs=64, heads=4, kv_heads=2, head_dim=32, context=256, touched_bytes=1, repeats=1
)


class Bench:
    """Kernels of one program, and their memory."""

    def __init__(self, card: Direct, sizes: Sizes) -> None:
        self.card, self.sizes = card, sizes
        self._owned: list[int] = []
        self._program = Program()
        kind = struct("state")
        self.state = self.room(ctypes.sizeof(kind))
        self.card.session.upload(self.state, kind(token=1, num_rows=1))
        self.base = struct("pass")(stop=self.state + kind.stop.offset, num_rows=self.state + kind.num_rows.offset)
        self._kept: list[object] = []

    def room(self, num_bytes: int) -> int:
        """Memory of the card, of zeros."""
        at = self.card.session.allocate(round_up(num_bytes, 256))
        self.card.call("cuMemsetD8Async", at, ctypes.c_ubyte(0), num_bytes, self.card.stream)
        self._owned.append(at)
        return at

    def upload(self, value: ctypes.Structure | ctypes.Array[Any]) -> int:
        at = self.room(ctypes.sizeof(value))
        self.card.session.upload(at, value)
        return at

    def kernel(self, kind: str, *sizes: int | str) -> str:
        return self._program.kernel(kind, *sizes)

    def compile(self) -> None:
        self._program.load(self.card.session, self.card.device.compiler.image)

    def node(self, nodes: Nodes, kernel: str, params: Any, threads: int, grid: Sequence[int]) -> None:
        nodes.add(kernel, params, threads=threads, grid=grid)

    def graph(self, nodes: Nodes) -> int:
        self._kept.append(nodes)
        return nodes.executable(self.card.session, self._program)

    def function(self, name: str) -> int:
        return self._program.function(name)

    def seconds(self, work: Callable[[], None]) -> float:
        """Of one `work`, which queues: the median of several trials, each of many."""
        repeats, found = self.sizes.repeats, []
        for _ in range(TRIALS if repeats > 1 else 1):
            work()
            self.card.synchronize()
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            self.card.synchronize()
            found.append((time.perf_counter() - began) / repeats)
        return median(found)

    def close(self) -> None:
        self.card.synchronize()
        for at in self._owned:
            self.card.session.free(at)
        self._program.close()


@contextmanager
def bench(card: Direct, sizes: Sizes) -> Iterator[Bench]:
    made = Bench(card, sizes)
    try:
        yield made
    finally:
        made.close()


def inputs_of(made: Bench, rows: int, columns: int) -> Any:
    padded = round_up(columns, 64)
    return struct("input")(quants=made.room(rows * padded), scales=made.room(rows * padded // 8))


def count_of(made: Bench, num_bytes: int) -> int:
    """So many reads of so many bytes that no cache holds them, as far as one graph takes them."""
    return max(1, min(NODES, made.sizes.touched_bytes // num_bytes))


Rate = tuple[str, int, Callable[[], None]]  # name, bytes, and the work


def linear(made: Bench, codec: str) -> tuple[str, int, Nodes]:
    """A projection in panels."""
    cols, rows = made.sizes.hidden, made.sizes.outs
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=rows, in_features=cols),))
    layout = get_codec(codec).layout(shape)
    kernel, nodes = made.kernel("LINEAR", f"OM_{codec.upper()}", cols, 1), Nodes()
    count, x, out = count_of(made, layout.num_bytes), inputs_of(made, 1, cols), made.room(4 * rows)
    place = matrix_struct(codec, shape.matrices[0], layout)
    threads, blocks = (
        launch("OM_LINEAR_THREADS", place.codec, cols, 1),
        launch("OM_LINEAR_BLOCKS", place.codec, rows, cols),
    )
    for _ in range(count):
        params = struct("linear_params")(**{"pass": made.base}, input=x, num_matrices=1)
        params.matrices[0] = card_matrix(place)
        params.records[0], params.outs[0] = made.room(layout.record_bytes), out
        made.node(nodes, kernel, params, threads, (blocks,))
    return f"linear {codec}", count * layout.num_bytes, nodes


def values(made: Bench) -> tuple[str, int, Nodes]:
    """A projection of bf16 numbers."""
    cols, rows = made.sizes.hidden, made.sizes.outs
    kernel, nodes = made.kernel("VALUES", "OM_BF16", cols, 1), Nodes()
    count, x, out = count_of(made, 2 * rows * cols), made.room(4 * cols), made.room(4 * rows)
    for _ in range(count):
        params = struct("linear_params")(**{"pass": made.base}, x=x, num_matrices=1)
        params.matrices[0] = struct("matrix")(codes=0, bias=-1, rows=rows)
        params.records[0], params.outs[0] = made.room(2 * rows * cols), out
        made.node(nodes, kernel, params, launch("OM_VALUES_THREADS"), (launch("OM_VALUES_BLOCKS", rows),))
    return "values bf16", count * 2 * rows * cols, nodes


def experts(made: Bench, codec: str, *, is_first: bool) -> tuple[str, int, Nodes]:
    """One matrix of top-k experts of one row, other ones in every launch."""
    hidden, inner, top_k = made.sizes.hidden, made.sizes.inner, made.sizes.top_k
    shape = ExpertShape(
        matrices=(
            Matrix(name="gate_up_proj", out_features=2 * inner, in_features=hidden),
            Matrix(name="down_proj", out_features=hidden, in_features=inner),
        )
    )
    layout = get_codec(codec).layout(shape)
    place = matrix_struct(codec, shape.matrices[0 if is_first else 1], layout, num_parts=2 if is_first else 1)
    share = layout.num_bytes * (2 if is_first else 1) // 3
    count, nodes = max(1, min(NODES, made.sizes.touched_bytes // (top_k * share))), Nodes()
    x, between = inputs_of(made, 1, hidden), inputs_of(made, top_k, inner)
    ids, weights, pairs = (
        made.upload((ctypes.c_int32 * top_k)(*range(top_k))),
        made.room(64),
        made.room(4 * top_k * hidden),
    )
    for _ in range(count):
        records = [made.room(layout.record_bytes) for _ in range(top_k)]
        addresses = made.upload((ctypes.c_uint64 * top_k)(*records))
        shared = {
            "pass": made.base,
            "matrix": card_matrix(place),
            "addresses": addresses,
            "hidden": between,
            "top_k": top_k,
        }
        if is_first:
            kernel = made.kernel("FIRST", f"OM_{codec.upper()}", hidden, inner, 1, "OM_SILU", 1)
            params = struct("first_params")(**shared, input=x, pairs_of_input=top_k)
            made.node(
                nodes,
                kernel,
                params,
                launch("OM_FIRST_THREADS", place.codec, hidden, 1, 1),
                (launch("OM_FIRST_BLOCKS", inner), top_k),
            )
        else:
            kernel = made.kernel("SECOND", f"OM_{codec.upper()}", inner, hidden, 1)
            more = {"ids": ids, "weights": weights, "pairs": pairs, "weight_scale": 1.0, "stride": top_k}
            params = struct("second_params")(**shared, **more)
            grid = (launch("OM_SECOND_BLOCKS", place.codec, hidden, inner), top_k)
            made.node(nodes, kernel, params, launch("OM_SECOND_THREADS", place.codec, inner, 1), grid)
    return f"experts {codec}, {'first' if is_first else 'second'} matrix", count * top_k * share, nodes


def attend(made: Bench) -> tuple[str, int, Nodes]:
    """Sections of grouped queries over a cache in pages, another cache in every launch."""
    sizes = made.sizes
    page, num_pages = constant("OM_CARD_PAGE"), -(-sizes.context // constant("OM_CARD_PAGE"))
    page_bytes = page * sizes.kv_heads * sizes.head_dim * 2
    sections = -(-sizes.context // constant("OM_CARD_SECTION"))
    kernel = made.kernel("ATTEND", sizes.heads, sizes.kv_heads, sizes.head_dim, 0, sizes.head_dim)
    positions, query = made.upload((ctypes.c_int32 * 1)(sizes.context - 1)), made.room(4 * sizes.heads * sizes.head_dim)
    attended = struct("attended")(
        sections=made.room(8 * sizes.heads * sections),
        sums=made.room(4 * sizes.heads * sections * sizes.head_dim),
        capacity=sections,
    )
    at, cache_bytes, nodes = made.upload(attended), 2 * num_pages * page_bytes, Nodes()
    count = count_of(made, cache_bytes)
    for _ in range(count):
        planes = []
        for _ in range(2):
            memory = made.room(num_pages * page_bytes)
            planes.append(
                made.upload((ctypes.c_uint64 * num_pages)(*(memory + n * page_bytes for n in range(num_pages))))
            )
        stride = page * sizes.head_dim
        room = struct("room")(key_pages=planes[0], value_pages=planes[1], key_stride=stride, value_stride=stride)
        view = struct("view")(rooms=made.upload(room), positions=positions)
        params = struct("attend_params")(**{"pass": made.base}, view=view, query=query, attended=at, scaling=0.1)
        made.node(nodes, kernel, params, launch("OM_ATTEND_THREADS"), (2 * made.card.device.num_processors,))
    return "attention, 8 heads a key" if sizes.heads == 32 else "attention", count * cache_bytes, nodes


def kernel_rates(card: Direct, sizes: Sizes) -> list[dict[str, Any]]:
    """Of every kernel that reads weights or a cache: bytes per second in a graph of it alone."""
    makers: list[Callable[[Bench], tuple[str, int, Nodes]]] = [values, attend]
    for codec in CODECS:
        makers.append(lambda made, codec=codec: linear(made, codec))
        makers += [
            lambda made, codec=codec, first=first: experts(made, codec, is_first=first) for first in (True, False)
        ]
    found = []
    for make in makers:
        with bench(card, sizes) as made:
            name, num_bytes, nodes = make(made)
            made.compile()
            executable = made.graph(nodes)
            seconds = made.seconds(lambda executable=executable: card.launch_graph(executable))
            card.session.free_graph(executable)
        found.append({"kernel": name, "bytes": num_bytes, "us": 1e6 * seconds, "gb_per_s": num_bytes / seconds / 1e9})
    return found


def launch_costs(card: Direct, sizes: Sizes) -> dict[str, float]:
    """Microseconds of the host per launch, of the card per node of a graph, and of one round; VRAM per node."""
    with bench(card, sizes) as made:
        kernel, cols = made.kernel("QUANTIZE", sizes.hidden), sizes.hidden
        params = struct("quantize_params")(**{"pass": made.base}, x=made.room(4 * cols))
        params.inputs[0] = inputs_of(made, 1, cols)
        made.compile()
        threads, grid = launch("OM_QUANTIZE_THREADS"), (launch("OM_QUANTIZE_BLOCKS", cols), 1)
        nodes = Nodes()
        for _ in range(NODES):
            nodes.add(kernel, params, threads=threads, grid=grid)
        before, num_graphs = card.free_bytes(), 64 if sizes.repeats > 1 else 2
        graphs = [made.graph(nodes) for _ in range(num_graphs)]
        for executable in graphs:
            card.launch_graph(executable)
        card.synchronize()
        taken = before - card.free_bytes()
        function, count = made.function(kernel), 200 if sizes.repeats > 1 else 2

        def queued_us(work: Callable[[], None]) -> float:
            began = time.perf_counter()
            for _ in range(count):
                work()
            spent = time.perf_counter() - began
            card.synchronize()
            return 1e6 * spent / count

        def one_round() -> None:
            card.launch(function, grid, threads, params)
            card.synchronize()

        found = {
            "kernel_launch_us": queued_us(lambda: card.launch(function, grid, threads, params)),
            "graph_launch_us": queued_us(lambda: card.launch_graph(graphs[0])),
            "launch_and_synchronize_us": queued_us(one_round),
            "graph_node_us": 1e6 * made.seconds(lambda: card.launch_graph(graphs[0])) / NODES,
            "graph_node_bytes": taken / (num_graphs * NODES),
        }
        for executable in graphs:
            card.session.free_graph(executable)
    return found


def fetch_rates(card: Direct, sizes: Sizes) -> list[dict[str, Any]]:
    """Records out of page-locked RAM: by the fetch kernel, and by copies."""
    record = round_up(3 * sizes.hidden * sizes.inner * 33 // 64, 16)
    most, found = sizes.top_k, []
    threads, grid = launch("OM_FETCH_THREADS"), (launch("OM_FETCH_BLOCKS"), most)
    source = SharedMemory(card.session, most * record)
    try:
        for count in (1, 2, 4, 8)[: most.bit_length()]:
            with bench(card, sizes) as made:
                made.compile()
                slots = made.room(most * record)
                fetches = struct("fetches")(count=count)
                for n in range(count):
                    fetches.source[n], fetches.slot[n] = source.address + n * record, slots + n * record
                params = struct("fetch_params")(
                    **{"pass": made.base}, fetches=made.upload(fetches), record_bytes=record
                )
                function = made.function("om_fetch")

                def fetch(function: int = function, params: Any = params) -> None:
                    card.launch(function, grid, threads, params)

                def copy(count: int = count, slots: int = slots) -> None:
                    for n in range(count):
                        host = ctypes.c_void_p(source.host + n * record)
                        card.call("cuMemcpyHtoDAsync_v2", slots + n * record, host, record, card.stream)

                kernel_s, copies_s = made.seconds(fetch), made.seconds(copy)
            rates = {
                "fetch_gb_per_s": count * record / kernel_s / 1e9,
                "copy_gb_per_s": count * record / copies_s / 1e9,
            }
            found.append({"records": count, "record_bytes": record, **rates, "ratio": copies_s / kernel_s})
    finally:
        source.close()
    return found


def flag_rounds(card: Direct, sizes: Sizes) -> dict[str, float]:
    """Microseconds from a launch until the host sees the flag that the kernel has set in its memory."""
    kind = struct("notice")
    notice, seen = SharedMemory(card.session, ctypes.sizeof(kind)), []
    try:
        with bench(card, sizes) as made:
            made.compile()
            params = struct("finish_params")(**{"pass": made.base}, state=made.state, notice=notice.address)
            flags, function = kind.from_address(notice.host), made.function("om_finish")
            for token in range(1, 201 if sizes.repeats > 1 else 3):
                began = time.perf_counter()
                card.launch(function, (1,), launch("OM_FINISH_THREADS"), params)
                while flags.done != token:
                    card.query()
                seen.append(1e6 * (time.perf_counter() - began))
                card.synchronize()
    finally:
        notice.close()
    return {"median_us": median(seen), "most_us": max(seen)}
