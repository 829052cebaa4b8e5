"""Reads that a run begins by itself: what it fetches, guesses, drops and gives up, and what Python hears of it."""

import errno
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from offload_moe.memory.arena import Arena
from offload_moe.memory.record_file import RecordFile
from offload_moe.native import kernels
from offload_moe.native.constants import FREE, RESIDENT
from offload_moe.quant.layout import round_up
from tests.unit.test_native_span import NUM_EXPERTS, NUM_LAYERS, TOP_K, Run, wait

NUM_KEYS, NUM_SLOTS = NUM_LAYERS * NUM_EXPERTS, 6
FIRST = NUM_KEYS  # slot on the disk's arena; those before are the run's
pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")
Completion = list[tuple[int, int, int, bool]]


class Disk:
    """The records of a run in a file; some of its experts are only there."""

    def __init__(self, path: Path, run: Run, part_bytes: int = 4096) -> None:
        self.path = path
        records = [record for layer in run.layers for record in layer.experts.records]
        self.num_bytes = round_up(max(record.numel() for record in records), 4096)
        self.arena = Arena(NUM_SLOTS, self.num_bytes)
        self.content = [bytes(record.numpy().tobytes().ljust(self.num_bytes, b"\0")) for record in records]
        path.write_bytes(b"".join(self.content))
        self.checksums = [zlib.crc32(each) for each in self.content]
        self.part_bytes = part_bytes
        run.addresses += self.arena.addresses
        run.slot_table.resize(FIRST + NUM_SLOTS)

    def slot(self, slot: int) -> torch.Tensor:
        return self.arena.slot(slot - FIRST)

    def bring(self, key: int, slot: int) -> None:
        self.slot(slot).copy_(torch.frombuffer(bytearray(self.content[key]), dtype=torch.uint8))

    @contextmanager
    def reads(self, run: Run, num_reserved: int, least_slots: int = 0, num_threads: int = 2) -> Iterator[kernels.Reads]:
        file = RecordFile(self.path)
        sizes = kernels.ReadSizes(
            num_threads=num_threads, part_bytes=self.part_bytes, prefetch_part_bytes=self.part_bytes
        )
        reads = kernels.Reads(run.slot_table, sizes)
        reads.use_file(0, file.native())
        for key in range(NUM_KEYS):
            offset = key * self.num_bytes
            place = kernels.PlaceStruct(file=0, offset=offset, num_bytes=self.num_bytes, checksum=self.checksums[key])
            reads.place(key, place)
        reads.need_below(least_slots)
        for slot in range(FIRST, FIRST + num_reserved):
            run.slot_table.reserve(slot)
            reads.reserve(slot)
        yield reads
        assert reads.close()
        file.close()


def completions_of(reads: kernels.Reads) -> Completion:
    return [each[:4] for each in reads.completions()]


def drain_completions(reads: kernels.Reads, num_completions: int) -> Completion:
    """So much completions, within ten seconds."""
    deadline, completions = time.monotonic() + 10, completions_of(reads)
    while time.monotonic() < deadline and len(completions) < num_completions:
        completions += completions_of(reads)
    return completions


def whole_run(ranks: Sequence[int] = ()) -> Run:
    run = Run(ranks)
    run.go()
    return run


def go(run: Run, reads: kernels.Reads, expected: Collection[tuple[int, int]] = ()) -> None:
    """Through all layers, which need this and nothing else."""
    needs: list[tuple[int, int]] = []
    with run.kernel.start(run.token, run.slot_table, reads) as token_pass:
        while (said := wait(token_pass, needs[-1][0] + 1 if needs else 0))[0] < NUM_LAYERS:
            needs.append(said)
    assert needs == list(expected)


@pytest.mark.parametrize("part_bytes", [4096, 1 << 20])
def test_what_is_missing_is_fetched_without_asking(tmp_path: Path, part_bytes: int) -> None:
    whole = whole_run()
    absent = [*whole.chosen(0)[:1], *whole.chosen(1), *whole.chosen(2)[1:2]]
    run = Run(absent=absent)
    disk = Disk(tmp_path / "experts", run, part_bytes)
    with disk.reads(run, NUM_SLOTS) as reads:
        go(run, reads)
        assert torch.equal(run.token.x, whole.token.x)
        completions = completions_of(reads)
        assert {key for key, *_ in completions} == set(absent)
        for key in absent:
            mine = [(slot, state, was_prefetch) for of, slot, state, was_prefetch in completions if of == key]
            slot = mine[0][0]
            assert mine == [(slot, kernels.READING, False), (slot, kernels.DONE, False)]
            assert disk.slot(slot).numpy().tobytes() == disk.content[key]
        assert completions_of(reads) == []
        assert sorted(reads.reclaim()) == sorted(
            set(range(FIRST, FIRST + NUM_SLOTS)) - {slot for _, slot, *_ in completions}
        )


def test_a_ride_reads_by_itself_what_is_cached_while_no_other_thread_does(tmp_path: Path) -> None:
    whole = whole_run()
    absent = whole.chosen(1)
    other = next(key for key in range(2 * NUM_EXPERTS, NUM_KEYS) if key not in whole.chosen(2))
    run, is_reading, may_end = Run(absent=[*absent, other]), threading.Event(), threading.Event()
    disk = Disk(tmp_path / "experts", run)

    def stuck(*_: int) -> int:
        is_reading.set()
        may_end.wait(10)
        return -errno.EIO

    with disk.reads(run, NUM_SLOTS - 1, num_threads=1) as reads:
        reads.read_with(stuck)
        reads.submit(other, FIRST + NUM_SLOTS - 1)
        assert is_reading.wait(10)
        reads.read_with(None)
        go(run, reads)
        assert not may_end.is_set()
        assert torch.equal(run.token.x, whole.token.x)
        done = [key for key, _, state, _ in completions_of(reads) if state == kernels.DONE]
        assert sorted(done) == sorted(absent)
        may_end.set()


def test_a_ride_says_that_its_slots_run_out_and_asks_for_what_it_cannot_fetch(tmp_path: Path) -> None:
    whole = whole_run()
    run = Run(absent=whole.chosen(1))
    disk = Disk(tmp_path / "experts", run)
    with (
        disk.reads(run, num_reserved=2, least_slots=1) as reads,
        run.kernel.start(run.token, run.slot_table, reads) as token_pass,
    ):
        assert wait(token_pass, 0) == (1, kernels.NEEDS_EXPERTS | kernels.NEEDS_SLOTS)
        (left,) = [key for key in run.chosen(1) if run.slot_table.slots[key] < 0]
        assert run.slot_table.admit(left, FIRST + 5)
        disk.bring(left, FIRST + 5)
        run.slot_table.loaded(FIRST + 5)
        assert wait(token_pass, 2)[0] == 2  # still short
        assert wait(token_pass, 3)[0] == NUM_LAYERS
    assert torch.equal(run.token.x, whole.token.x)


@pytest.mark.parametrize("damage", ["short", "flipped"])
@pytest.mark.parametrize("is_given_up", [True, False])
def test_a_read_that_fails_leaves_its_slot_to_who_has_patience(tmp_path: Path, damage: str, is_given_up: bool) -> None:
    whole = whole_run()
    missing = whole.chosen(1)[0]
    run = Run(absent=[missing])
    disk = Disk(tmp_path / "experts", run)
    if damage == "short":
        disk.path.write_bytes(disk.path.read_bytes()[: missing * disk.num_bytes + 100])
    else:
        disk.checksums[missing] ^= 1
    with disk.reads(run, 1) as reads:
        with run.kernel.start(run.token, run.slot_table, reads) as token_pass:
            completions = drain_completions(reads, 2)
            assert [(key, slot, state) for key, slot, state, _ in completions] == [
                (missing, FIRST, kernels.READING),
                (missing, FIRST, kernels.FAILED),
            ]
            assert run.slot_table.slots[missing] == FIRST
            assert token_pass.next(0) is None
            if is_given_up:
                assert run.slot_table.vacate(FIRST)
                assert wait(token_pass, 0) == (1, kernels.NEEDS_EXPERTS)
                assert run.slot_table.admit(missing, FIRST)
            disk.bring(missing, FIRST)
            run.slot_table.loaded(FIRST)
            assert wait(token_pass, 0)[0] == NUM_LAYERS
        assert list(reads.reclaim()) == []
    assert torch.equal(run.token.x, whole.token.x)


def test_guesses_that_count_are_fetched_and_wrong_ones_are_no_loss(tmp_path: Path) -> None:
    """All that the first layer guesses for the second is absent; what of it the second wants is there or on its way."""
    whole = whole_run([TOP_K])
    guessed = [NUM_EXPERTS + expert for expert in whole.token.guesses[0, 0].tolist()]
    run = Run([2], absent=guessed)
    with Disk(tmp_path / "experts", run).reads(run, NUM_SLOTS) as reads:
        go(run, reads)
        assert torch.equal(run.token.x, whole.token.x)
        assert run.token.guesses_found[0, 0].tolist() == [kernels.FETCHED, kernels.FETCHED, kernels.MISSING]
        expected = {*guessed[:2], *(set(run.chosen(1)) & set(guessed))}
        completions = drain_completions(reads, 2 * len(expected))
        fetched = {key for key, _, state, was_prefetch in completions if state == kernels.READING and was_prefetch}
        assert fetched == set(guessed[:2])
        wanted = fetched & set(run.chosen(1))
        ended = {key: state for key, _, state, _ in completions if state != kernels.READING}
        assert all(ended[key] == kernels.DONE for key in wanted)
        assert set(ended) == expected


def test_prefetches_leave_the_last_slots_to_what_is_demanded(tmp_path: Path) -> None:
    whole = whole_run([TOP_K])
    guessed = [NUM_EXPERTS + expert for expert in whole.token.guesses[0, 0].tolist()]
    run = Run([TOP_K], absent=guessed)
    with (
        Disk(tmp_path / "experts", run).reads(run, num_reserved=2, least_slots=4) as reads,
        run.kernel.start(run.token, run.slot_table, reads) as token_pass,
    ):
        assert wait(token_pass, 0)[0] == 0
        assert run.token.guesses_found[0, 0].tolist() == [kernels.MISSING] * TOP_K


FORGOTTEN = """
import gc
from offload_moe.native import kernels
slot_table = kernels.SlotTable(1, 1)
sizes = kernels.ReadSizes(num_threads=2, part_bytes=4096, prefetch_part_bytes=4096)
slot_table.cycle = kernels.Reads(slot_table, sizes)
del slot_table
gc.collect()
"""


def test_a_model_that_was_not_closed_is_forgotten_in_any_order() -> None:
    """What reads use goes after them. A process of its own, as one that got it wrong hung."""
    subprocess.run([sys.executable, "-c", FORGOTTEN], check=True, timeout=60)


def test_what_arrives_in_a_slot_that_was_vacated_changes_nothing() -> None:
    table = kernels.SlotTable(2, 2)
    table.loaded(1)
    assert list(table.states) == [FREE, FREE]
    assert list(table.slots) == list(table.keys) == [-1, -1]
    with pytest.raises(AssertionError, match="no expert is loading into slot 1"):
        table.arrive(1)
    assert table.admit(0, 1)
    table.loaded(1)
    assert list(table.states) == [FREE, RESIDENT]
