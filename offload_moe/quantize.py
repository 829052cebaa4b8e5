"""`quantize`: from a Hugging Face checkpoint to an expert store, one expert at a time."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.formats import quantization_settings
from offload_moe.checkpoint.linears import projection_linears
from offload_moe.checkpoint.source import Source, metadata_files, resolve_source
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.kernels import fast_encoding
from offload_moe.quant import Codec, ExpertShape, Matrix, get_codec
from offload_moe.store.manifest import DenseEntry, Layer, Manifest
from offload_moe.store.manifest_json import FORMAT_VERSION, manifest_to_json
from offload_moe.store.plan import Blob, PlannedFile, plan_files, record_blob
from offload_moe.store.progress import OnProgress, Progress, ignore_progress
from offload_moe.store.writer import Payload, StoreWriter, describe_metadata, stored_files

DEFAULT = "nf4"
MXFP4 = "mxfp4"
LOSSLESS = "bf16"  # as a dense codec: every dense weight stays as the checkpoint has it
NUM_WORKERS = 2  # one encodes while the other reads; more experts in memory would not be faster
COPY_BYTES = 1 << 25

Job = tuple[Blob, Callable[[], Payload]]


def quantize(
    source: str | Path,
    store: str | Path,
    *,
    codec: str | None = None,
    dense_codec: str = LOSSLESS,
    revision: str | None = None,
    token: str | None = None,
    progress: OnProgress | None = None,
) -> Path:
    """Convert a checkpoint folder or hub id into an expert store and return the store's folder.

    codec: of the experts; None takes mxfp4 for a checkpoint in MXFP4, whose bits it keeps, and nf4 for any other.
    dense_codec: of the large dense projections.

    Memory stays bounded by a few experts and the largest dense tensor that has to be converted. A conversion that was
    stopped, by whatever means, is resumed by the same call.

    Raises:
        ConfigError: there is no such codec, or it does not suit the source.
        CheckpointError, UnsupportedModelError: the source cannot be read or bound.
        StoreError: the target folder is in use for something else.
        BudgetError: the disk is too small, or became full.
        TransferError: a download, a read or a write failed.
    """
    report = progress or ignore_progress
    linears_codec = _dense_codec(dense_codec)
    if codec is not None:
        get_codec(codec)  # before a download
    origin = resolve_source(source, revision=revision, token=token)
    experts_codec = get_codec(codec or default_codec(origin.folder))
    with Checkpoint(origin.folder) as checkpoint:
        _check_codec(experts_codec, checkpoint)
        if checkpoint.ignored:
            what = f"{len(checkpoint.ignored)} tensors of multi-token prediction, of images or of older versions"
            phase = f"Skipping {what}, such as {checkpoint.ignored[0]}"
            report(Progress(phase=phase, done_bytes=-1, total_bytes=0))
        files, jobs = plan_conversion(checkpoint, experts_codec, linears_codec)
        settings = _settings(origin, checkpoint, experts_codec.name, dense_codec, files)
        with StoreWriter(Path(store), files, settings) as writer:
            sizes = [blob.num_bytes for file in files for blob in file.blobs]
            done = sum(sizes[: writer.num_done])
            report(Progress(phase="Quantizing", done_bytes=done, total_bytes=sum(sizes)))
            for num_bytes in writer.write(_ahead(jobs[writer.num_done :])):
                done += num_bytes
                report(Progress(phase="Quantizing", done_bytes=done, total_bytes=sum(sizes)))
            metadata = {name: path.read_bytes() for name, path in metadata_files(origin.folder).items()}
            manifest = _manifest(origin, checkpoint, experts_codec.name, dense_codec, files, writer, metadata)
            writer.finish(manifest_to_json(manifest), metadata)
    return Path(store)


def default_codec(folder: Path) -> str:
    """What the experts of a checkpoint folder become when nobody chose: its own format where that is a codec."""
    settings = quantization_settings(folder)
    return MXFP4 if settings is not None and settings.get("quant_method") == MXFP4 else DEFAULT


def plan_conversion(
    checkpoint: Checkpoint, experts_codec: Codec, linears_codec: Codec
) -> tuple[list[PlannedFile], list[Callable[[], Payload]]]:
    """The files of the store to be, and what makes the bytes of each of their blobs, in order."""
    dense = _dense_jobs(checkpoint, fast_encoding(linears_codec))
    experts = _expert_jobs(checkpoint, fast_encoding(experts_codec))
    files = plan_files("dense", (b for b, _ in dense)) + plan_files("experts", (b for b, _ in experts))
    return files, [job for _, job in dense + experts]


def _dense_codec(name: str) -> Codec:
    if name == MXFP4:
        raise ConfigError(f"{MXFP4} is a format of experts. Use another dense codec, such as int8.")
    return get_codec(name)


def _check_codec(codec: Codec, checkpoint: Checkpoint) -> None:
    """Raises: ConfigError for MXFP4 of numbers that were never in it: nf4 is both smaller and more exact."""
    if codec.name == MXFP4 and not checkpoint.is_mxfp4:
        raise ConfigError(
            f"{MXFP4} keeps the bits of checkpoints in MXFP4, which {checkpoint.folder} is not. Use {DEFAULT}: it is "
            "smaller and closer to the original."
        )


def _expert_jobs(checkpoint: Checkpoint, codec: Codec) -> list[Job]:
    """Every expert in flat order."""
    read = checkpoint.packed_expert if codec.name == MXFP4 and checkpoint.is_mxfp4 else checkpoint.expert

    def encode(ordinal: int, expert: int) -> Payload:
        layer = checkpoint.layers[ordinal]
        try:
            record = codec.encode(layer.shape, read(ordinal, expert))
        except CheckpointError as error:
            raise CheckpointError(f"Expert {expert} of {layer.name}: {error}") from error
        return [_bytes(record)]

    return [
        (
            record_blob(f"layers.{ordinal}.experts.{expert}", codec.layout(layer.shape).record_bytes),
            partial(encode, ordinal, expert),
        )
        for ordinal, layer in enumerate(checkpoint.layers)
        for expert in range(layer.num_experts)
    ]


def _dense_jobs(checkpoint: Checkpoint, codec: Codec) -> list[Job]:
    """Records of quantized linears first, then wider dtypes before narrower ones, so that everything is aligned."""
    shapes = {} if codec.name == LOSSLESS else _linear_shapes(checkpoint)

    def encode(name: str) -> Payload:
        shape = shapes[name]
        tensors = {part: checkpoint.dense_tensor(f"{name}.{part}") for part in shape.module_shapes()}
        try:
            return [_bytes(codec.encode(shape, tensors))]
        except CheckpointError as error:
            raise CheckpointError(f"{name}.weight: {error}") from error

    def copy(name: str) -> Payload:
        dtype = checkpoint.dense[name].dtype
        return (_bytes(_checked(name, chunk, dtype)) for chunk in checkpoint.dense_chunks(name, COPY_BYTES))

    inside = {f"{name}.{part}" for name, shape in shapes.items() for part in shape.module_shapes()}
    plain = sorted((t for t in checkpoint.dense.values() if t.name not in inside), key=lambda t: -t.dtype.itemsize)
    records: list[Job] = [
        (
            record_blob(f"{name}.weight", codec.layout(shape).record_bytes, quantized=shape),
            partial(encode, name),
        )
        for name, shape in shapes.items()
    ]
    return records + [
        (
            Blob(name=t.name, dtype=t.dtype, shape=t.shape, num_bytes=t.num_bytes),
            partial(copy, t.name),
        )
        for t in plain
    ]


def _checked(name: str, data: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of numbers. Infinite ones may be meant: masks are kept with them. Raises: CheckpointError for NaN."""
    if dtype.is_floating_point:
        values = data.view(dtype)
        if values.sum().isnan() and values.isnan().any():
            raise CheckpointError(
                f"{name}: it has NaN weights, which would spoil every answer. Download the model again."
            )
    return data


def _linear_shapes(checkpoint: Checkpoint) -> dict[str, ExpertShape]:
    """Module name -> the one-matrix shape of each linear that a dense codec quantizes, with its bias if it has one."""
    shapes = {}
    for name, linear in projection_linears(checkpoint.model).items():
        if f"{name}.weight" in checkpoint.dense:
            matrix = Matrix(name="weight", out_features=linear.out_features, in_features=linear.in_features)
            biases = (("bias", linear.out_features),) if linear.bias is not None else ()
            shapes[name] = ExpertShape(matrices=(matrix,), biases=biases)
    return shapes


def _ahead(jobs: Sequence[Callable[[], Payload]]) -> Iterator[Payload]:
    """Run jobs in order, a few ahead of the one that is asked for."""
    pool = ThreadPoolExecutor(NUM_WORKERS)
    pending: deque[Future[Payload]] = deque()
    waiting = iter(jobs)
    try:
        for _ in jobs:
            for job in waiting:
                pending.append(pool.submit(job))
                if len(pending) > NUM_WORKERS:
                    break
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _bytes(data: Tensor) -> memoryview:
    return data.reshape(-1).view(torch.uint8).numpy().data


def _settings(
    origin: Source, checkpoint: Checkpoint, codec: str, dense_codec: str, files: Iterable[PlannedFile]
) -> dict[str, Any]:
    """What must be the same for a conversion to be resumed; the keys are what its error message names."""
    stats = [(path.name, path.stat()) for path in (*checkpoint.tensors.paths, origin.folder / "config.json")]
    state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    plan = hashlib.sha256(b"".join(file.header for file in files)).hexdigest()
    return {
        "format version": FORMAT_VERSION,
        "source": origin.name,
        "revision": origin.revision,
        "state of the source files": state,
        "codec": codec,
        "dense codec": dense_codec,
        "layout": plan,
    }


def _manifest(
    origin: Source,
    checkpoint: Checkpoint,
    codec: str,
    dense_codec: str,
    files: Sequence[PlannedFile],
    writer: StoreWriter,
    metadata: dict[str, bytes],
) -> Manifest:
    blobs = [blob for file in files for blob in file.blobs]
    num_dense = len(blobs) - sum(layer.num_experts for layer in checkpoint.layers)
    places = writer.places()
    record_bytes = [get_codec(codec).layout(layer.shape).record_bytes for layer in checkpoint.layers]
    return Manifest(
        source=origin.name,
        revision=origin.revision,
        codec=codec,
        dense_codec=dense_codec,
        layers=tuple(
            Layer(name=layer.name, num_experts=layer.num_experts, record_bytes=num_bytes, shape=layer.shape)
            for layer, num_bytes in zip(checkpoint.layers, record_bytes, strict=True)
        ),
        files=stored_files(files),
        experts=tuple(places[num_dense:]),
        dense=tuple(
            DenseEntry(name=blob.name, dtype=blob.dtype, shape=blob.shape, place=place, quantized=blob.quantized)
            for blob, place in zip(blobs[:num_dense], places[:num_dense], strict=True)
        ),
        metadata=describe_metadata(metadata),
    )


__all__ = ["Progress", "quantize"]
