"""The writing side of an expert store: resumable at the last finished record, and loadable only when complete.

Data files are written under a `.part` name in the order of the plan; `store.json` comes last. A resumed conversion
gives the same bytes as an undisturbed one.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload_moe.errors import BudgetError
from offload_moe.native.kernels import crc32
from offload_moe.store import durable
from offload_moe.store.journal import Journal
from offload_moe.store.manifest import DataFile, Place, StoredFile
from offload_moe.store.plan import PlannedFile
from offload_moe.store.reading import checksum_of
from offload_moe.system.folders import make_folder
from offload_moe.system.open_files import WRITING, open_descriptor
from offload_moe.system.paths import MANIFEST_NAME
from offload_moe.system.sizes import format_size

FLUSH_BYTES = 256 << 20  # more dirty pages would only prolong the last sync of a file

Payload = Iterable[memoryview]


class StoreWriter:
    """Writes planned files into a folder. On entry it claims the folder and checks the finished part."""

    def __init__(self, folder: Path, files: Sequence[PlannedFile], settings: dict[str, Any]) -> None:
        """`settings` must be the same for a conversion to be resumed."""
        self._folder = folder
        self._files = files
        with durable.named_errors(folder):
            self._journal = Journal(folder, settings)
            self.notice = self._journal.notice
            try:
                self.num_done = self._recover()
                self._journal.cut(self.num_done)
                self._check_space()
            except BaseException:
                self._journal.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._journal.close()

    def write(self, payloads: Iterator[Payload]) -> Iterator[int]:
        """Write the blobs from `num_done` on, in the order of the plan; yields the bytes of each finished blob.

        Raises:
            BudgetError: the disk is full.
            TransferError: writing failed.
        """
        first = 0
        for file in self._files:
            skip = max(0, self.num_done - first)
            first += len(file.blobs)
            if skip < len(file.blobs):
                yield from self._write_file(file, skip, payloads)

    def places(self) -> list[Place]:
        """The places of all blobs, in the order of the plan, once all are written."""
        checksums = iter(self._journal.checksums)
        return [
            Place(file=index, offset=offset, num_bytes=blob.num_bytes, checksum=next(checksums))
            for index, file in enumerate(self._files)
            for blob, offset in zip(file.blobs, file.offsets(), strict=True)
        ]

    def finish(self, manifest: str, metadata: dict[str, bytes], clean_up: Callable[[], None] | None = None) -> None:
        """Write the small files and then the manifest, after which the store can be loaded.

        clean_up: called afterwards. Until it returns, the conversion can be resumed, so a kill leaves no remains.
        """
        with durable.named_errors(self._folder):
            for name, data in metadata.items():
                make_folder((self._folder / name).parent)
                durable.write_file(self._folder / name, data)
            durable.write_file(self._folder / MANIFEST_NAME, manifest.encode())
            if clean_up is not None:
                clean_up()
            self._journal.remove()

    def _write_file(self, file: PlannedFile, skip: int, payloads: Iterator[Payload]) -> Iterator[int]:
        part = self._part(file)
        with durable.named_errors(self._folder):
            descriptor = open_descriptor(part, WRITING)
        try:
            offset = file.offsets()[skip] if skip else 0
            with durable.named_errors(self._folder):
                os.ftruncate(descriptor, offset)
                if not skip:
                    durable.write_at(descriptor, file.header, 0)
                    offset = len(file.header)
            flushed = offset
            for blob in file.blobs[skip:]:
                payload = next(payloads)
                with durable.named_errors(self._folder):
                    self._write_blob(descriptor, payload, offset, blob.num_bytes)
                    offset += blob.num_bytes
                    if offset - flushed >= FLUSH_BYTES:
                        durable.sync(descriptor)
                        flushed = offset
                yield blob.num_bytes
            with durable.named_errors(self._folder):
                self._complete(file, descriptor)
        finally:
            os.close(descriptor)

    def _write_blob(self, descriptor: int, payload: Payload, offset: int, num_bytes: int) -> None:
        checksum, end = 0, offset + num_bytes
        for chunk in payload:
            durable.write_at(descriptor, chunk, offset)
            checksum = crc32(chunk, checksum)
            offset += len(chunk)
        assert offset == end, "a blob is not as long as planned"
        self._journal.append(checksum)
        self.num_done += 1

    def _complete(self, file: PlannedFile, descriptor: int) -> None:
        durable.sync(descriptor)
        self._journal.sync()
        durable.publish(self._part(file), self._folder / file.name)

    def _recover(self) -> int:
        """The number of finished blobs, in order; a complete file under its temporary name is renamed."""
        done = 0
        for file in self._files:
            expected = self._journal.checksums[done : done + len(file.blobs)]
            final = self._folder / file.name
            complete = len(expected) == len(file.blobs)
            if complete and final.exists() and final.stat().st_size == file.num_bytes:
                done += len(expected)
                continue
            intact = self._intact(file, expected)
            done += intact
            if intact < len(file.blobs):
                break
            descriptor = open_descriptor(self._part(file), os.O_RDWR)
            try:
                os.ftruncate(descriptor, file.num_bytes)
                self._complete(file, descriptor)
            finally:
                os.close(descriptor)
        return done

    def _intact(self, file: PlannedFile, checksums: list[int]) -> int:
        """The number of leading blobs of an unfinished file that match the journal."""
        part = self._part(file)
        if not checksums or not part.exists():
            return 0
        with part.open("rb", buffering=0) as stream:
            if stream.read(len(file.header)) != file.header:
                return 0
            for count, (blob, offset, checksum) in enumerate(zip(file.blobs, file.offsets(), checksums, strict=False)):
                if checksum_of(stream.fileno(), offset, blob.num_bytes) != checksum:
                    return count
        return len(checksums)

    def _check_space(self) -> None:
        """Check that the rest of the store fits on the disk. Raises: BudgetError."""
        paths = [path for file in self._files for path in (self._folder / file.name, self._part(file))]
        present = sum(_bytes_on_disk(path) for path in paths if path.exists())
        needed = sum(file.num_bytes for file in self._files) - present
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise BudgetError(
                f"The store needs {format_size(needed)} more on the disk of {self._folder}, {format_size(free)} is "
                f"free. Free {format_size(needed - free)} or choose another folder."
            )

    def _part(self, file: PlannedFile) -> Path:
        return self._folder / (file.name + durable.PART)


def stored_files(files: Sequence[PlannedFile]) -> tuple[DataFile, ...]:
    """The data files' entries of the manifest."""
    return tuple(DataFile(name=f.name, num_bytes=f.num_bytes, checksum=crc32(f.header), order=f.order) for f in files)


def describe_metadata(metadata: dict[str, bytes]) -> tuple[StoredFile, ...]:
    """The small files' entries of the manifest."""
    return tuple(StoredFile(name=n, num_bytes=len(data), checksum=crc32(data)) for n, data in metadata.items())


def _bytes_on_disk(path: Path) -> int:
    """Of a file; less than its size where it has holes and the system reports them."""
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
