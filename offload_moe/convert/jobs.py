"""The work of a conversion: the source of each part of a store, its file, and the order."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.linears import projection_linears
from offload_moe.checkpoint.weights import ModelWeights
from offload_moe.convert.numbers import check_numbers
from offload_moe.convert.weighing import Encoding, Unweighed, Weighing
from offload_moe.errors import CheckpointError
from offload_moe.native.kernels import panel_order
from offload_moe.quant import LEAST_ERROR, Codec, ExpertShape, Matrix
from offload_moe.quant.blockwise import BlockwiseCodec
from offload_moe.quant.pieces import encode_pieces
from offload_moe.store.manifest import MTP
from offload_moe.store.order import Order, order_of_codec, reorder
from offload_moe.store.plan import Blob, PlannedFile, plan_files, record_blob
from offload_moe.store.writer import Payload

MXFP4 = "mxfp4"
LOSSLESS = "bf16"  # as a dense codec: every dense weight stays in the checkpoint's dtype
WHOLE_BYTES = 1 << 26  # a larger dense matrix is read and encoded by runs of rows
RUN_BYTES = 1 << 23  # read at a time of a dense tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One part of the store: `make` returns its bytes, made from the checkpoint's files at `paths`."""

    blob: Blob
    make: Callable[[], Payload]
    paths: frozenset[Path]


OrderOf = Callable[[str], Order | None]  # of the rows in the record of that name; None: as new stores have it


def plan_conversion(
    checkpoint: Checkpoint,
    experts_codec: Codec,
    linears_codec: Codec,
    *,
    scales: str = LEAST_ERROR,
    weighing: Weighing | None = None,
    by_shard: bool = False,
    order_of: OrderOf = lambda name: None,
) -> tuple[list[PlannedFile], list[Job]]:
    """The planned files of the store, and the jobs that fill them, in order.

    scales: see `fast_encoding`. weighing: of errors; None weighs none.
    by_shard: parts that need only the first shard come first, in files of their own, then those that need the second.
    """
    number = {path: index for index, path in enumerate(checkpoint.tensors.paths)} if by_shard else {}
    linears, experts = (
        Encoding(codec=codec, scales=scales, weighing=weighing or Unweighed())
        for codec in (linears_codec, experts_codec)
    )
    made_of = {
        "dense": dense_jobs(checkpoint, linears, order_of),
        "experts": expert_jobs(checkpoint, experts, order_of),
        "mtp": [],
    }
    if checkpoint.mtp is not None:  # in files of its own, which are not read where it is not used
        linears, experts = (replace(each, weighing=Unweighed()) for each in (linears, experts))  # by no known inputs
        made_of["mtp"] = [
            *expert_jobs(checkpoint.mtp, experts, order_of, first_layer=len(checkpoint.layers)),
            *dense_jobs(checkpoint.mtp, linears, order_of, prefix=MTP),
        ]
    stages: dict[int, dict[str, list[Job]]] = {}
    for kind, made in made_of.items():
        for job in made:
            stage = max((number.get(path, 0) for path in job.paths), default=0)
            stages.setdefault(stage, {kind: [] for kind in made_of})[kind].append(job)
    files: list[PlannedFile] = []
    jobs: list[Job] = []
    first = dict.fromkeys(made_of, 1)
    for _, stage_jobs in sorted(stages.items()):
        for prefix, made in stage_jobs.items():
            planned = plan_files(prefix, (job.blob for job in made), first=first[prefix])
            first[prefix] += len(planned)
            files += planned
            jobs += made
    return files, jobs


def expert_jobs(checkpoint: ModelWeights, encoding: Encoding, order_of: OrderOf, *, first_layer: int = 0) -> list[Job]:
    """Every expert in flat order. first_layer: the ordinal of the first layer in the store."""
    codec = encoding.codec
    read = checkpoint.packed_expert if codec.name == MXFP4 and checkpoint.is_mxfp4 else checkpoint.expert

    def encode(ordinal: int, expert: int, order: Order) -> Payload:
        layer = checkpoint.layers[ordinal]
        with _errors_name(f"Expert {expert} of {layer.name}"):
            tensors = read(ordinal, expert)
            record = encoding.of_expert(ordinal, expert, tensors).encode(layer.shape, tensors)
        reorder(record, panel_order(codec.name, layer.shape), "rows", order)
        return [as_bytes(record)]

    def job(ordinal: int, expert: int, record_bytes: int) -> Job:
        name = expert_name(first_layer + ordinal, expert)
        order = order_of(name) or order_of_codec(codec.name)
        return Job(
            blob=record_blob(name, record_bytes, order=order),
            make=partial(encode, ordinal, expert, order),
            paths=checkpoint.expert_paths(ordinal, expert),
        )

    return [
        job(ordinal, expert, codec.layout(layer.shape).record_bytes)
        for ordinal, layer in enumerate(checkpoint.layers)
        for expert in range(layer.num_experts)
    ]


def dense_jobs(checkpoint: ModelWeights, encoding: Encoding, order_of: OrderOf, *, prefix: str = "") -> list[Job]:
    """Records of quantized linears first, then wider dtypes before narrower ones, so that everything is aligned.

    prefix: of the names in the store.
    """
    codec = encoding.codec
    shapes = {} if codec.name == LOSSLESS else linear_shapes(checkpoint)

    def encode(name: str, order: Order) -> Payload:
        shape = shapes[name]
        if checkpoint.dense[f"{name}.weight"].num_bytes > WHOLE_BYTES:
            return encode_runs(name, shape, order)
        tensors = {part: checkpoint.dense_tensor(f"{name}.{part}") for part in shape.module_shapes()}
        with _errors_name(f"{name}.weight"):
            record = encoding.of_linear(name).encode(shape, tensors)
        reorder(record, panel_order(codec.name, shape), "rows", order)
        return [as_bytes(record)]

    def encode_runs(name: str, shape: ExpertShape, order: Order) -> Payload:
        bias = checkpoint.dense_tensor(f"{name}.bias") if shape.biases else None
        rows = checkpoint.dense_rows(f"{name}.weight", RUN_BYTES)
        with _errors_name(f"{name}.weight"):
            weighed = encoding.of_linear(name)
            assert isinstance(weighed, BlockwiseCodec)
            yield from map(as_bytes, encode_pieces(weighed, shape, rows, bias, in_panels=order == "panels"))

    inside = {f"{name}.{part}" for name, shape in shapes.items() for part in shape.module_shapes()}

    def job(name: str, shape: ExpertShape) -> Job:
        stored = f"{prefix}{name}.weight"
        order = order_of(stored) or order_of_codec(codec.name)
        return Job(
            blob=record_blob(stored, codec.layout(shape).record_bytes, shape, order=order),
            make=partial(encode, name, order),
            paths=frozenset().union(*(checkpoint.dense_paths(f"{name}.{part}") for part in shape.module_shapes())),
        )

    plain = copy_jobs(checkpoint, (name for name in checkpoint.dense if name not in inside), prefix)
    return [job(name, shape) for name, shape in shapes.items()] + plain


def copy_jobs(checkpoint: ModelWeights, names: Iterable[str], prefix: str = "") -> list[Job]:
    """Dense tensors of these names as they are: wider dtypes before narrower ones, so that everything is aligned."""

    def copy(name: str) -> Payload:
        dtype = checkpoint.dense[name].dtype
        return (as_bytes(_checked(name, chunk, dtype)) for chunk in checkpoint.dense_chunks(name, RUN_BYTES))

    return [
        Job(
            blob=Blob(name=prefix + t.name, dtype=t.dtype, shape=t.shape, num_bytes=t.num_bytes),
            make=partial(copy, t.name),
            paths=checkpoint.dense_paths(t.name),
        )
        for t in sorted((checkpoint.dense[name] for name in names), key=lambda t: -t.dtype.itemsize)
    ]


def expert_name(layer: int, expert: int) -> str:
    """The tensor name of a record in its file; `layer` is the ordinal of the MoE layer."""
    return f"layers.{layer}.experts.{expert}"


@contextmanager
def _errors_name(what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error


def _checked(name: str, data: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of numbers. Raises: CheckpointError for NaN."""
    if dtype.is_floating_point:
        check_numbers(name, data.view(dtype))
    return data


def linear_shapes(checkpoint: ModelWeights) -> dict[str, ExpertShape]:
    """Module name -> the one-matrix shape of each linear that a dense codec quantizes, with its bias if it has one."""
    shapes = {}
    for name, linear in projection_linears(checkpoint.model).items():
        if f"{name}.weight" in checkpoint.dense:
            matrix = Matrix(name="weight", out_features=linear.out_features, in_features=linear.in_features)
            biases = (("bias", linear.out_features),) if linear.bias is not None else ()
            shapes[name] = ExpertShape(matrices=(matrix,), biases=biases)
    return shapes


def as_bytes(data: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied."""
    return data.reshape(-1).view(torch.uint8).numpy().data
