"""Source shards during a conversion: fetched before they are read, deleted when they are no longer needed."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from offload_moe.checkpoint.download import Download
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.convert.jobs import Job
from offload_moe.store.plan import PlannedFile
from offload_moe.store.writer import Payload


class SourceShards:
    """The shards of one conversion. Without a download nothing is fetched or deleted."""

    def __init__(
        self, download: Download | None, tensors: TensorSource, files: Sequence[PlannedFile], jobs: Sequence[Job]
    ) -> None:
        self._download = download
        self._tensors = tensors
        self._jobs = jobs
        self._ends = [sum(len(file.blobs) for file in files[: index + 1]) for index in range(len(files))]
        self._needed_until: dict[Path, int] = dict.fromkeys(tensors.paths, 0)
        for index, job in enumerate(jobs):
            for path in job.paths:
                self._needed_until[path] = index + 1

    def makers(self, first: int) -> Iterator[Callable[[], Payload]]:
        """The jobs of the blobs from `first` on; each shard is fetched before its first job, on this thread."""
        for job in self._jobs[first:]:
            if self._download is not None:
                for path in sorted(job.paths):
                    self._download.provide(path)
            yield job.make

    def delete_until(self, count: int) -> None:
        """Delete shards that only blobs in complete files among the first `count` blobs need.

        Such files must be synced to the disk.
        """
        if self._download is None:
            return
        safe = max((end for end in self._ends if end <= count), default=0)
        for path in [path for path, end in self._needed_until.items() if end <= safe]:
            self._tensors.release(path)
            self._download.discard(path)
            del self._needed_until[path]
