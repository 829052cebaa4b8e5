"""`quantize`: from a Hugging Face checkpoint to an expert store, one expert at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from offload_moe.checkpoint.adapter import Adapter
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.download import Download
from offload_moe.checkpoint.formats import is_mxfp4
from offload_moe.checkpoint.gguf_records import MTP_LEFT_OUT
from offload_moe.checkpoint.small_files import SmallFiles, read_small_files
from offload_moe.checkpoint.source import Source, open_download, resolve_source
from offload_moe.convert.choose_weighing import WeighingOptions
from offload_moe.convert.description import Chosen, manifest_of, settings_of
from offload_moe.convert.gguf import plan_same_bits
from offload_moe.convert.gguf_source import local_gguf, names_gguf, small_files_of
from offload_moe.convert.jobs import LOSSLESS, MXFP4, Job, plan_conversion
from offload_moe.convert.source_shards import SourceShards
from offload_moe.errors import ConfigError
from offload_moe.native.kernels import use_torch_after_fork
from offload_moe.quant import LEAST_ERROR, Codec, codec_names, get_codec, is_built_in
from offload_moe.store.beside import beside
from offload_moe.store.in_place import GGUF
from offload_moe.store.journal import check_target
from offload_moe.store.manifest import MergedAdapter
from offload_moe.store.manifest_json import manifest_to_json
from offload_moe.store.writer import Payload, StoreWriter
from offload_moe.system.names import DOWNLOAD, hub_name
from offload_moe.system.paths import user_path
from offload_moe.system.progress import Progress, log_notice, silent

DEFAULT = "nf4"
NUM_WORKERS = 2  # one thread encodes while the other reads; more experts in memory would not be faster


def quantize(
    source: str | Path,
    store: str | Path,
    *,
    codec: str | None = None,
    dense_codec: str = LOSSLESS,
    scales: str = LEAST_ERROR,
    imatrix: str | Path | None = None,
    calibrate: str | Path | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    delete_source_shards: bool = False,
    follow_links: bool = False,
    progress: Progress = silent,
    on_notice: Callable[[str], None] = log_notice,
) -> Path:
    """Convert a checkpoint folder, hub id or GGUF file into an expert store and return the store's folder.

    codec: of the experts; None keeps all bits of a GGUF file, takes mxfp4 for a checkpoint in MXFP4, whose bits it
        keeps, and nf4 for any other.
    dense_codec: of the large dense projections.
    scales: of nf4 and int8. "error" takes those of least squared error, "absmax" bitsandbytes' own bits.
    imatrix: llama.cpp's importance matrix of this model in GGUF form, by which errors are weighed.
    calibrate: a text, or "auto" for a built-in one. The model reads it first, layer by layer; errors are weighed by the
        inputs of each matrix, and in nf4 later columns take up the errors of earlier ones.
    adapter: the folder of a LoRA adapter in PEFT's files, which is merged into the weights.
    delete_source_shards: download a hub id shard by shard into a folder beside the store, and delete each once
        everything in it is safely in the store. Needs the disk for the store and about two shards.
    follow_links: also follow symbolic links in a folder to files of other users.
    progress: receives every step. on_notice: receives notices about unused or unusual files; the default logs them.

    Memory is bounded by a few experts: large dense matrices are read, copied and encoded by groups of rows. Only
    tensors that transformers splits or merges, or that are packed by columns (GPTQ, AWQ, bitsandbytes), are whole in
    memory. A conversion that was stopped, by whatever means, is resumed by the same call.

    Raises:
        ConfigError: there is no such codec, it does not suit the source, or options exclude each other.
        CheckpointError, UnsupportedModelError: the source cannot be read or bound.
        StoreError: the target folder is in use for something else.
        BudgetError: the disk is too small, or became full.
        TransferError: a download, a read or a write failed.
    """
    use_torch_after_fork()
    source, revision = hub_name(source, revision)
    linears_codec = get_dense_codec(dense_codec)
    options = WeighingOptions(imatrix=imatrix, calibrate=calibrate)
    options.check(scales=scales, deletes_shards=delete_source_shards)
    if codec is not None:
        get_codec(codec)  # before a download
    target = Path(store)
    check_target(target)
    lora = None if adapter is None else Adapter(user_path(adapter))
    if codec is None and names_gguf(source):  # before a download, too
        _check_keeps_bits(dense_codec, has_adapter=lora is not None)
    gguf, commit = local_gguf(source, revision=revision, token=token, keeps_bits=codec is None, progress=progress)
    with ExitStack() as stack:
        download = None
        if delete_source_shards:
            download = _begin_download(source, target, revision, token, progress)
            stack.callback(download.close)
            origin = Source(folder=download.folder, name=str(source), revision=download.commit)
        elif gguf:
            origin = small_files_of(gguf, str(source), commit, stack)
        else:
            beside = None if lora is None else lora.folder
            origin = resolve_source(source, revision=revision, token=token, follow_links=follow_links, adapter=beside)
        checkpoint = stack.enter_context(Checkpoint(origin.folder, download, gguf, lora))
        keeps_bits = bool(gguf) and codec is None
        codec = GGUF if keeps_bits else codec or default_codec(origin.folder)
        small_files = read_small_files(origin.folder, checkpoint.model)
        _report_notices(checkpoint, small_files, progress, on_notice)
        weighing = options.open(checkpoint, codec, dense_codec, target, progress, on_notice)
        if keeps_bits:
            files, jobs = plan_same_bits(checkpoint)
            if checkpoint.mtp is not None:
                on_notice(MTP_LEFT_OUT)
            dense_codec = GGUF
        else:
            experts_codec = get_codec(codec)
            _check_codec(experts_codec, checkpoint)
            files, jobs = plan_conversion(
                checkpoint,
                experts_codec,
                linears_codec,
                scales=scales,
                weighing=weighing,
                by_shard=download is not None,
            )
        chosen = Chosen(
            codec=codec,
            dense_codec=dense_codec,
            scales=scales,
            importances=weighing.importances,
            adapter=None if lora is None else MergedAdapter(name=lora.name, sha256=lora.sha256),
        )
        settings = settings_of(origin, checkpoint, chosen, files, is_download=download is not None)
        with StoreWriter(target, files, settings) as writer:
            if writer.notice is not None:
                on_notice(writer.notice)
            if writer.num_done < len(jobs):
                weighing.prepare(settings)
            _fill(writer, SourceShards(download, checkpoint.tensors, files, jobs), jobs, progress)
            manifest = manifest_of(origin, checkpoint, chosen, files, writer, small_files.contents)
            clean_up = weighing.remove if download is None else download.remove
            writer.finish(manifest_to_json(manifest), small_files.contents, clean_up)
    return target


def _check_keeps_bits(dense_codec: str, *, has_adapter: bool) -> None:
    """Raises: ConfigError for what the bits of a GGUF file cannot be kept with."""
    if dense_codec != LOSSLESS:
        raise ConfigError(
            f"A GGUF file keeps the types of all its matrices. Leave --dense-codec {dense_codec} out, or choose a "
            "--codec as well, to quantize everything anew."
        )
    if has_adapter:
        raise ConfigError("A GGUF file keeps the bits of its matrices. Choose a --codec to merge an adapter.")


def _begin_download(
    source: str | Path, target: Path, revision: str | None, token: str | None, progress: Progress
) -> Download:
    return open_download(
        source,
        beside(target, DOWNLOAD),
        revision=revision,
        token=token,
        progress=progress,
    )


def _report_notices(
    checkpoint: Checkpoint, small_files: SmallFiles, progress: Progress, on_notice: Callable[[str], None]
) -> None:
    if checkpoint.ignored:
        what = f"{len(checkpoint.ignored)} tensors of multi-token prediction, of images or of older versions"
        progress(f"Skipping {what}, such as {checkpoint.ignored[0]}")
    for text in (*checkpoint.notices, *small_files.notices):
        on_notice(text)


def _fill(writer: StoreWriter, shards: SourceShards, jobs: Sequence[Job], progress: Progress) -> None:
    """Write the blobs that are missing."""
    shards.delete_until(writer.num_done)
    done = sum(job.blob.num_bytes for job in jobs[: writer.num_done])
    total = sum(job.blob.num_bytes for job in jobs)
    progress("Quantizing", done, total)
    for num_bytes in writer.write(_ahead(shards.makers(writer.num_done))):
        done += num_bytes
        shards.delete_until(writer.num_done - 1)  # the file of the last blob may not be synced yet
        progress("Quantizing", done, total)
    shards.delete_until(writer.num_done)


def default_codec(folder: Path) -> str:
    """The default codec for the experts of a checkpoint folder: its own format if that is a codec."""
    return MXFP4 if is_mxfp4(folder) else DEFAULT


def get_dense_codec(name: str) -> Codec:
    """The codec of dense weights that has this name. Raises: ConfigError."""
    if name == MXFP4 or (not is_built_in(name) and name in codec_names()):
        raise ConfigError(f"{name} is a format of experts. Use another dense codec, such as int8.")
    return get_codec(name)


def _check_codec(codec: Codec, checkpoint: Checkpoint) -> None:
    """Refuse MXFP4 for other checkpoints, where nf4 is both smaller and more exact. Raises: ConfigError."""
    if codec.name == MXFP4 and not checkpoint.is_mxfp4:
        raise ConfigError(
            f"{MXFP4} keeps the bits of checkpoints in MXFP4, which {checkpoint.folder} is not. Use {DEFAULT}: it is "
            "smaller and closer to the original."
        )


def _ahead(makers: Iterable[Callable[[], Payload]]) -> Iterator[Payload]:
    """Run the jobs in order, a few ahead of the consumer."""
    pool = ThreadPoolExecutor(NUM_WORKERS)
    pending: deque[Future[Payload]] = deque()
    try:
        for make in makers:
            pending.append(pool.submit(make))
            if len(pending) > NUM_WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
