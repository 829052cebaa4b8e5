"""Which shards each part of a store needs, and the order that follows from it."""

from pathlib import Path

import pytest

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.shards import Shards
from offload_moe.convert.jobs import plan_conversion
from offload_moe.quant import get_codec
from offload_moe.system import open_files
from offload_moe.system.open_files import open_descriptor
from tests.support.checkpoints import spread, write_checkpoint


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "switch_transformers", "dbrx"])
def test_a_part_reads_only_the_shards_it_names_and_comes_with_the_last_of_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[Path] = set()

    def note(path: Path) -> int:
        opened.add(path)
        return open_descriptor(path)

    monkeypatch.setattr(open_files, "open_descriptor", note)
    write_checkpoint(tmp_path, family)
    spread(tmp_path, per_shard=3)
    codecs = get_codec("bf16"), get_codec("int8")
    with Checkpoint(tmp_path) as checkpoint:
        files, jobs = plan_conversion(checkpoint, *codecs, by_shard=True)
        assert [blob for file in files for blob in file.blobs] == [job.blob for job in jobs]
        assert len({file.name for file in files}) == len(files)
        assert {job.blob.name for job in jobs} == {job.blob.name for job in plan_conversion(checkpoint, *codecs)[1]}
        stages = [max(checkpoint.tensors.paths.index(path) for path in job.paths) for job in jobs]
        assert stages == sorted(stages)
        assert isinstance(checkpoint.tensors, Shards)
        for job in jobs:
            checkpoint.tensors.close()
            opened.clear()
            for _ in job.make():
                pass
            assert not opened or opened == job.paths  # the other half of a split tensor was kept
