"""The work of a conversion that keeps the bits of a GGUF file: each expert's parts become one record, read at once."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.gguf_records import GgufRecords
from offload_moe.convert.jobs import RUN_BYTES, Job, as_bytes, copy_jobs, expert_name
from offload_moe.native.kernels import panel_order
from offload_moe.quant import Codec, ExpertShape
from offload_moe.quant.layout import weight_shape
from offload_moe.store.order import order_of_codec, reorder
from offload_moe.store.plan import Blob, PlannedFile, plan_files
from offload_moe.store.writer import Payload


def plan_same_bits(checkpoint: Checkpoint) -> tuple[list[PlannedFile], list[Job]]:
    """As `plan_conversion`. Raises: CheckpointError naming a tensor of experts whose type has no kernel."""
    records = GgufRecords(checkpoint)
    plain = copy_jobs(checkpoint, (name for name in checkpoint.dense if records.dense_codec(name) is None))
    dense = [*_dense_records(records), *plain]
    experts = [
        _record_job(
            expert_name(ordinal, expert),
            layer.shape,
            layer.codec,
            partial(records.read_expert, ordinal, expert),
            frozenset(run.path for run in layer.runs(expert)),
        )
        for ordinal, layer in enumerate(records.layers)
        for expert in range(layer.num_experts)
    ]
    files = [
        file
        for prefix, jobs in (("dense", dense), ("experts", experts))
        for file in plan_files(prefix, (job.blob for job in jobs))
    ]
    return files, [*dense, *experts]


def _dense_records(records: GgufRecords) -> list[Job]:
    checkpoint, table = records.checkpoint, records.lookup_name
    jobs = []
    for name in checkpoint.dense:
        if (codec := records.dense_codec(name)) is not None:
            shape, is_lookup = weight_shape(*checkpoint.dense[name].shape), name == table
            make = partial(_dense_record, records, name, in_panels=not is_lookup)
            jobs.append(Job(blob=_blob(name, shape, codec, is_lookup), make=make, paths=checkpoint.dense_paths(name)))
    return jobs


def _record_job(name: str, shape: ExpertShape, codec: Codec, read: partial[Tensor], paths: frozenset[Path]) -> Job:
    return Job(blob=_blob(name, shape, codec, False), make=partial(_record, read, shape, codec), paths=paths)


def _blob(name: str, shape: ExpertShape, codec: Codec, is_lookup: bool) -> Blob:
    num_bytes = codec.layout(shape).record_bytes
    return Blob(
        name=name,
        dtype=torch.uint8,
        shape=(num_bytes,),
        num_bytes=num_bytes,
        quantized=shape,
        order="rows" if is_lookup else order_of_codec(codec.name),
        codec=codec.name,
        is_lookup=is_lookup,
    )


def _record(read: partial[Tensor], shape: ExpertShape, codec: Codec) -> Payload:
    record = read()
    reorder(record, panel_order(codec.name, shape), "rows", "panels")
    return [as_bytes(record)]


def _dense_record(records: GgufRecords, name: str, *, in_panels: bool) -> Payload:
    """The record of a dense matrix, by groups of rows; bytes that fill no dword lie behind the panels of all."""
    codec = records.dense_codec(name)
    assert codec is not None
    num_rows, columns = records.checkpoint.dense[name].shape
    rest = codec.layout(weight_shape(num_rows, columns)).record_bytes
    sides = []
    for rows in records.dense_rows(name, RUN_BYTES):
        shape = weight_shape(len(rows), columns)
        record, (part,) = codec.encode(shape, {"weight.codes": rows}), codec.parts(shape)
        end = part.num_bytes
        if in_panels and not part.kind.is_plain:
            reorder(record, panel_order(codec.name, shape), "rows", "panels")
            end = part.sides_offset
        yield as_bytes(record[:end])
        sides.append(record[end : part.num_bytes].clone())
        rest -= part.num_bytes
    yield as_bytes(torch.cat([*sides, torch.zeros(rest, dtype=torch.uint8)]))
