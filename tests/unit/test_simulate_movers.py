"""The movers of the simulation against times worked out by hand."""

import pytest

from offload_moe.memory.transfers import Transfers
from offload_moe.native.kernels import SlotTable
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import make_policy
from offload_moe.residency.residency import Residency
from offload_moe.residency.scheduler import Scheduler
from offload_moe.simulate import DiskModel, LinkModel
from offload_moe.simulate.clock import VirtualClock, VirtualCondition
from offload_moe.simulate.disk import VirtualDisk
from offload_moe.simulate.link import VirtualLink
from offload_moe.simulate.processor import DeviceProcessor, Processor
from offload_moe.simulate.reader import VirtualReader

MB = 1_000_000
WHOLE = 1 << 40  # records are read in one part


class Arrivals:
    def __init__(self, clock: VirtualClock) -> None:
        self.at: dict[int, float] = {}
        self._clock = clock

    def __call__(self, slot: int, num_bytes: int, error: BaseException | None) -> None:
        assert error is None
        assert slot not in self.at
        self.at[slot] = self._clock.now


def mover_of(clock: VirtualClock, model: DiskModel, record_bytes: int, table: SlotTable | None = None) -> Transfers:
    """table: None makes one that admits expert n into slot n."""
    disk = VirtualDisk(clock, model, record_bytes)
    if table is None:
        table = SlotTable(8, 8)
        assert all(table.admit(slot, slot) for slot in range(8))
    return VirtualReader(table, disk, VirtualCondition(clock)).transfers


def read(
    model: DiskModel, record_bytes: int, demands: int, prefetches: int = 0, hurry: int | None = None
) -> list[float]:
    clock = VirtualClock()
    disk, arrivals = mover_of(clock, model, record_bytes), Arrivals(clock)
    for slot in range(demands + prefetches):
        disk.start(slot, slot, arrivals, is_prefetch=slot >= demands)
    if hurry is not None:
        disk.promote(hurry)
    while clock.run_next():
        pass
    return [arrivals.at[slot] for slot in range(demands + prefetches)]


def test_one_read_takes_its_latency_and_its_bytes() -> None:
    model = DiskModel(bytes_per_s=100 * MB, latency_s=0.01, part_bytes=WHOLE)
    assert read(model, 10 * MB, 1) == pytest.approx([0.11])


def test_reads_at_once_share_the_disk_and_one_alone_is_bound_by_its_stream() -> None:
    model = DiskModel(bytes_per_s=100 * MB, stream_bytes_per_s=50 * MB, latency_s=0.0, part_bytes=WHOLE)
    assert read(model, 10 * MB, 1) == pytest.approx([0.2])
    assert read(model, 10 * MB, 2) == pytest.approx([0.2, 0.2])
    assert read(model, 10 * MB, 4) == pytest.approx([0.4] * 4)


def test_a_fifth_read_waits_for_a_reader() -> None:
    model = DiskModel(bytes_per_s=100 * MB, latency_s=0.0, part_bytes=WHOLE)
    assert read(model, 10 * MB, 5) == pytest.approx([0.4] * 4 + [0.5])


def test_the_parts_of_a_record_are_read_side_by_side() -> None:
    model = DiskModel(bytes_per_s=100 * MB, stream_bytes_per_s=25 * MB, latency_s=0.0, part_bytes=MB)
    assert read(model, 4 * MB, 1) == pytest.approx([0.04])
    assert read(model, 4 * MB, 2) == pytest.approx([0.04, 0.08])


def test_prefetches_leave_half_of_the_readers_to_demands_and_one_that_is_demanded_does_not_wait() -> None:
    model = DiskModel(bytes_per_s=100 * MB, latency_s=0.0, part_bytes=WHOLE)
    assert read(model, 10 * MB, 0, prefetches=3) == pytest.approx([0.2, 0.2, 0.3])
    assert read(model, 10 * MB, 0, prefetches=3, hurry=2) == pytest.approx([0.3] * 3)


def test_only_the_first_read_of_an_expert_is_checked() -> None:
    clock = VirtualClock()
    model = DiskModel(bytes_per_s=100 * MB, check_bytes_per_s=50 * MB, latency_s=0.0, part_bytes=WHOLE)
    disk, first, second = mover_of(clock, model, 10 * MB), Arrivals(clock), Arrivals(clock)
    disk.start(7, 0, first)
    while clock.run_next():
        pass
    disk.start(7, 1, second)
    while clock.run_next():
        pass
    assert (first.at[0], second.at[1]) == pytest.approx((0.3, 0.4))


def test_a_copy_waits_for_the_disk_the_link_and_the_readers_of_its_slot() -> None:
    clock = VirtualClock()
    processor = DeviceProcessor(clock)
    keys, table = ExpertKeys([8]), SlotTable(8, 8)
    reader = mover_of(clock, DiskModel(bytes_per_s=100 * MB, latency_s=0.0, part_bytes=WHOLE), 10 * MB, table)
    residency = Residency(table, make_policy("lru", keys, num_slots=8))
    changed = reader.changed
    ram = Scheduler(residency, reader, keys=keys, clock=clock, changed=changed)
    link = VirtualLink(clock, LinkModel(bytes_per_s=1000 * MB, latency_s=0.001), ram, processor, 10 * MB)
    arrivals = Arrivals(clock)
    processor.run(0.0, 0.5)
    link.used([1])  # until 0.5
    for slot in (0, 1):
        link.start(slot, slot, arrivals)
    while clock.run_next():
        pass
    assert arrivals.at[0] == pytest.approx(0.2 + 0.01 + 0.001)  # both reads share the disk
    assert arrivals.at[1] == pytest.approx(0.5 + 0.01 + 0.001)
    assert not any(ram.residency.num_leases(slot) for slot in range(8))


def test_the_host_runs_ahead_of_a_device_and_waits_when_it_needs_a_result() -> None:
    clock = VirtualClock()
    device = DeviceProcessor(clock)
    device.run(0.1, 1.0)
    device.run(0.1, 1.0)
    assert clock.now == pytest.approx(0.2)
    device.synchronize()
    assert clock.now == pytest.approx(2.0)
    assert device.waited_s == pytest.approx(1.8)
    host = Processor(clock)
    host.run(0.1, 1.0)
    assert clock.now == pytest.approx(3.1)
