"""Arena and disk tier: alignment, real reads, short reads, missing files."""

import zlib
from pathlib import Path

import torch

from offload_moe.errors import TransferError
from offload_moe.memory.arena import Arena
from offload_moe.store import Record
from tests.support.disk import disk_mover, read

RECORD = 8192


def record(path: Path, key: int) -> Record:
    """Where record `key` lies, with the checksum of what is there now."""
    content = path.read_bytes()[key * RECORD : (key + 1) * RECORD] if path.exists() else b""
    return Record(name=f"expert {key}", path=path, offset=key * RECORD, num_bytes=RECORD, checksum=zlib.crc32(content))


def test_slots_are_page_aligned_and_do_not_overlap() -> None:
    arena = Arena(num_slots=7, slot_bytes=5000, chunk_bytes=3 * 8192)
    starts = [arena.slot(index).data_ptr() for index in range(7)]
    assert all(start % 4096 == 0 for start in starts)
    for index in range(7):
        arena.slot(index).fill_(index)
    assert [int(arena.slot(index).float().mean()) for index in range(7)] == list(range(7))
    assert arena.num_bytes == 7 * 8192


def test_records_arrive_whole(tmp_path: Path) -> None:
    path = tmp_path / "experts.bin"
    content = torch.randint(0, 256, (5 * RECORD,), dtype=torch.uint8)
    path.write_bytes(content.numpy().tobytes())
    arena = Arena(num_slots=2, slot_bytes=RECORD)
    mover = disk_mover(arena, lambda key: record(path, key))
    for key in (4, 0, 2):
        assert read(mover, key, key % 2) == (RECORD, None)
        assert torch.equal(arena.slot(key % 2), content[key * RECORD : (key + 1) * RECORD])
    mover.close()


def test_a_short_file_names_the_file_and_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "experts.bin"
    path.write_bytes(b"x" * (RECORD + 100))
    mover = disk_mover(Arena(1, RECORD), lambda key: record(path, key))
    num_bytes, error = read(mover, 1, 0)
    assert num_bytes == 0
    assert isinstance(error, TransferError)
    assert "experts.bin" in str(error)
    assert "offset" in str(error)
    assert read(mover, 0, 0) == (RECORD, None)
    mover.close()


def test_a_missing_file_is_a_transfer_error(tmp_path: Path) -> None:
    path = tmp_path / "gone.bin"
    mover = disk_mover(Arena(1, RECORD), lambda key: record(path, key))
    _, error = read(mover, 0, 0)
    assert isinstance(error, TransferError)
    mover.close()


def test_a_flipped_bit_is_refused_with_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "experts.bin"
    path.write_bytes(bytes(3 * RECORD))
    records = [record(path, key) for key in range(3)]
    path.write_bytes(bytes(RECORD) + b"\x01" + bytes(2 * RECORD - 1))
    mover = disk_mover(Arena(1, RECORD), records.__getitem__)
    _, error = read(mover, 1, 0)
    assert isinstance(error, TransferError)
    assert "expert 1" in str(error)
    assert f"experts.bin at offset {RECORD}" in str(error)
    assert read(mover, 2, 0) == (RECORD, None)
    mover.close()
