"""Records that are read into RAM come into the order that the kernels read, after their checksum is compared."""

import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload_moe.errors import TransferError
from offload_moe.memory.arena import Arena
from offload_moe.memory.disk import DiskMover
from offload_moe.native.kernels import PanelOrder, Repacking, SlotTable
from offload_moe.quant.layout import round_up
from offload_moe.store import Record
from tests.support.disk import pread, read
from tests.support.kernels import Experts, make_experts

CODECS = ("nf4", "int8", "mxfp4")
NUM_RECORDS = 4
AS_STORED, TO_ROWS = 2, 3  # keys of records that stay as they are, and that are in panels on the disk


class Disk:
    """Records of ragged matrices, two of which come into panels, and one into rows."""

    def __init__(self, folder: Path, codec: str) -> None:
        self.experts: Experts = make_experts(codec, 200, 72, count=NUM_RECORDS)
        self.num_bytes = round_up(self.experts.layout.num_bytes, 4096)
        self.order = PanelOrder(codec, self.experts.shape, self.experts.layout, has_gate=True)
        self.path = folder / "experts"
        self.order.to_panels(self.experts.records[TO_ROWS])
        self.stored = [record.numpy().tobytes().ljust(self.num_bytes, b"\0") for record in self.experts.records]
        self.path.write_bytes(b"".join(self.stored))
        self.arena = Arena(NUM_RECORDS, self.num_bytes)
        table = SlotTable(NUM_RECORDS, NUM_RECORDS, self.arena.addresses)
        self.mover = DiskMover(self.arena, table, self.record_of, self.repacking_of, num_readers=2)

    def record_of(self, key: int) -> Record:
        offset, checksum = key * self.num_bytes, zlib.crc32(self.stored[key])
        return Record(name=f"expert {key}", path=self.path, offset=offset, num_bytes=self.num_bytes, checksum=checksum)

    def repacking_of(self, key: int) -> Repacking | None:
        return None if key == AS_STORED else Repacking(self.order, key != TO_ROWS)

    def in_panels(self, key: int) -> Tensor:
        record = torch.frombuffer(bytearray(self.stored[key]), dtype=torch.uint8)
        self.order.to_panels(record)
        return record


@pytest.mark.parametrize("codec", CODECS)
def test_records_arrive_in_the_order_that_is_read(codec: str, tmp_path: Path) -> None:
    disk = Disk(tmp_path, codec)
    for _ in range(2):  # the second read of a record compares no checksum
        for key in range(NUM_RECORDS):
            assert read(disk.mover, key, slot=key) == (disk.num_bytes, None)
        for key in (0, 1):
            assert torch.equal(disk.arena.slot(key), disk.in_panels(key))
            assert disk.arena.slot(key).numpy().tobytes() != disk.stored[key]
        assert disk.arena.slot(AS_STORED).numpy().tobytes() == disk.stored[AS_STORED]
        rows = disk.arena.slot(TO_ROWS).clone()
        assert rows.numpy().tobytes() != disk.stored[TO_ROWS]
        disk.order.to_panels(rows)
        assert rows.numpy().tobytes() == disk.stored[TO_ROWS]
    disk.mover.close()


def test_a_damaged_record_fails_and_a_transfer_that_was_wrong_once_is_read_again(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "nf4")
    wrong = [1]

    def flip_once(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        count = pread(descriptor, address, num_bytes, offset)
        if wrong[0] > 0:
            wrong[0] -= 1
            disk.arena.slot(0)[7] ^= 1
        return count

    disk.mover.reads.read_with(flip_once)
    assert read(disk.mover, 0) == (disk.num_bytes, None)
    assert torch.equal(disk.arena.slot(0), disk.in_panels(0))
    wrong[0] = 2
    _, error = read(disk.mover, 1)
    assert isinstance(error, TransferError)
    assert "checksum" in str(error)
    disk.mover.close()


def test_nothing_is_repacked_where_both_orders_are_the_same(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "nf4")
    disk.mover.close()
    order = disk.order
    assert Repacking.between(None, None) is None
    assert Repacking.between(order, order) is None
    assert Repacking.between(None, order) == (order, True)
    assert Repacking.between(order, None) == (order, False)
