"""The fake driver notices each kind of disorder that it is there for, and no order that is right."""

import ctypes
import math
import threading
from collections.abc import Iterator

import pytest
from support.cuda import shim
from support.cuda.calls import Card, DriverError, Params
from support.cuda.fake import POLLS, READS, WRITES, FakeDriver

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
ORDERS = (0, 1, 2, 3)


@pytest.fixture(params=ORDERS)
def fake(request: pytest.FixtureRequest) -> Iterator[FakeDriver]:
    with FakeDriver(order=request.param) as driver:
        yield driver


@pytest.fixture
def card(fake: FakeDriver) -> Card:
    return Card(fake)


def ramp(first: float = 0.0) -> list[float]:
    return [first + i for i in range(64)]


def only_problem(fake: FakeDriver) -> str:
    (problem,) = fake.problems()
    return problem


def test_a_copy_a_kernel_and_a_copy_in_one_stream(card: Card) -> None:
    stream, x, y = card.stream(), card.alloc(64), card.alloc(64)
    source, result = card.floats(ramp()), card.floats([0.0] * 64)
    card.call("cuMemcpyHtoDAsync_v2", x, source, 256, stream)
    card.add(stream, x, y, 1.0)
    card.call("cuMemcpyDtoHAsync_v2", result, y, 256, stream)
    assert list((ctypes.c_float * 64).from_address(result)) == [0.0] * 64  # nothing has run
    card.call("cuStreamSynchronize", stream)
    assert card.read(result, 64) == ramp(1.0)


def test_new_memory_of_the_card_is_poisoned(card: Card) -> None:
    stream, x, result = card.stream(), card.alloc(64), card.floats([0.0] * 64)
    card.call("cuMemcpyDtoHAsync_v2", result, x, 256, stream)
    card.call("cuStreamSynchronize", stream)
    assert all(math.isnan(value) for value in card.read(result, 64))


def test_a_missing_synchronization_is_found(card: Card) -> None:
    stream, x, result = card.stream(), card.alloc(64), card.floats([0.0] * 64)
    card.call("cuMemsetD8Async", x, 0, 256, stream)
    card.call("cuMemcpyDtoHAsync_v2", result, x, 256, stream)
    card.read(result, 64)
    card.call("cuStreamSynchronize", stream)
    assert "nothing orders them" in only_problem(card.fake)
    card.read(result, 64)
    assert card.fake.problems() == []


@pytest.mark.parametrize("has_event", [True, False])
def test_a_missing_event_between_streams_is_found(card: Card, has_event: bool) -> None:
    copies, compute, x, y = card.stream(), card.stream(), card.alloc(64), card.alloc(64)
    card.call("cuMemcpyHtoDAsync_v2", x, card.floats(ramp()), 256, copies)
    event = card.made("cuEventCreate", 2)
    card.call("cuEventRecord", event, copies)
    if has_event:
        card.call("cuStreamWaitEvent", compute, event, 0)
    card.add(compute, x, y, 1.0)
    for stream in (compute, copies):
        card.call("cuStreamSynchronize", stream)
    problems = card.fake.problems()
    assert len(problems) == (0 if has_event else 1)
    assert has_event or ("om_add reads" in problems[0] and "a copy to the card" in problems[0])


def test_what_an_event_does_not_cover_is_not_ordered(card: Card) -> None:
    copies, compute, x, y = card.stream(), card.stream(), card.alloc(64), card.alloc(64)
    event = card.made("cuEventCreate", 2)
    card.call("cuEventRecord", event, copies)  # too early
    card.call("cuMemcpyHtoDAsync_v2", x, card.floats(ramp()), 256, copies)
    card.call("cuStreamWaitEvent", compute, event, 0)
    card.add(compute, x, y, 1.0)
    for stream in (compute, copies):
        card.call("cuStreamSynchronize", stream)
    assert "nothing orders them" in only_problem(card.fake)


def test_waiting_for_an_event_that_was_never_recorded_is_found(card: Card) -> None:
    card.call("cuStreamWaitEvent", card.stream(), card.made("cuEventCreate", 2), 0)
    assert "never recorded" in only_problem(card.fake)


@pytest.mark.parametrize("waits", [True, False])
def test_reusing_a_page_locked_source_too_early_is_found(card: Card, waits: bool) -> None:
    stream, x, source = card.stream(), card.alloc(64), card.floats(ramp())
    card.call("cuMemcpyHtoDAsync_v2", x, source, 256, stream)
    if waits:
        card.call("cuStreamSynchronize", stream)
    card.fake.host(source, 256, WRITES)
    card.call("cuStreamSynchronize", stream)
    assert len(card.fake.problems()) == (0 if waits else 1)


@pytest.mark.parametrize("waits", [True, False])
def test_unlocking_pages_that_a_kernel_reads_is_found(card: Card, waits: bool) -> None:
    pages = (ctypes.c_float * 2048)(*range(2048))
    at = (ctypes.addressof(pages) + 4095) // 4096 * 4096
    card.call("cuMemHostRegister_v2", at, 256, 3)
    device = card.made("cuMemHostGetDevicePointer_v2", at, 0)
    stream, to = card.stream(), card.alloc(64)
    card.add(stream, device, to, 0.0)
    if waits:
        card.call("cuStreamSynchronize", stream)
    card.call("cuMemHostUnregister", at)
    card.call("cuStreamSynchronize", stream)
    problems = card.fake.problems()
    assert bool(problems) is not waits
    assert waits or any("cuMemHostUnregister" in problem for problem in problems)


def test_memory_that_is_only_portable_is_not_mapped(card: Card) -> None:
    at = card.made("cuMemHostAlloc", 256, 1)
    with pytest.raises(DriverError, match="cuMemHostGetDevicePointer_v2: 1"):
        card.made("cuMemHostGetDevicePointer_v2", at, 0)
    stream = card.stream()
    card.add(stream, at, card.alloc(64), 0.0)
    card.call("cuStreamSynchronize", stream)
    assert "the card does not reach them" in only_problem(card.fake)


def test_a_kernel_that_reads_past_an_allocation_is_found(card: Card) -> None:
    stream, x, y = card.stream(), card.alloc(60), card.alloc(64)
    card.call("cuMemsetD8Async", x, 0, 240, stream)
    card.add(stream, x, y, 1.0)
    card.call("cuStreamSynchronize", stream)
    assert "om_add reads 256 bytes from byte 0 of allocation 0 (240 bytes) on" in only_problem(card.fake)


def test_a_graph_keeps_the_parameters_that_it_was_given(card: Card) -> None:
    stream, x, y, result = card.stream(), card.alloc(64), card.alloc(64), card.floats([0.0] * 64)
    card.call("cuMemcpyHtoDAsync_v2", x, card.floats(ramp()), 256, stream)
    graph = card.made("cuGraphCreate", 0)
    params = Params(**{"from": x, "to": y}, value=1.0, count=ctypes.c_int(64))
    node = card.node("om_add", params)
    handle = card.made("cuGraphAddKernelNode_v2", graph, None, 0, ctypes.byref(node))
    params.struct.value = 5.0
    executable = card.instantiate(graph)
    card.call("cuGraphLaunch", executable, stream)
    card.call("cuMemcpyDtoHAsync_v2", result, y, 256, stream)
    card.call("cuStreamSynchronize", stream)
    assert card.read(result, 64) == ramp(1.0)
    card.call("cuGraphExecKernelNodeSetParams_v2", executable, handle, ctypes.byref(node))
    card.call("cuGraphLaunch", executable, stream)
    card.call("cuMemcpyDtoHAsync_v2", result, y, 256, stream)
    card.call("cuStreamSynchronize", stream)
    assert card.read(result, 64) == ramp(5.0)
    assert card.fake.count("nodes") == 2


def test_a_captured_address_that_was_freed_is_found(card: Card) -> None:
    stream, x, y = card.stream(), card.alloc(64), card.alloc(64)
    graph = card.made("cuGraphCreate", 0)
    card.add_node(graph, x, y, 1.0)
    executable = card.instantiate(graph)
    card.call("cuMemFree_v2", x)
    card.call("cuGraphLaunch", executable, stream)
    card.call("cuStreamSynchronize", stream)
    assert "memory of the card that is not allocated" in only_problem(card.fake)


@pytest.mark.parametrize("joins", [True, False])
def test_branches_of_a_graph_are_ordered_only_where_they_join(card: Card, joins: bool) -> None:
    stream = card.stream()
    x, y, z, result = card.alloc(64), card.alloc(64), card.alloc(64), card.floats([0.0] * 64)
    card.call("cuMemcpyHtoDAsync_v2", x, card.floats(ramp()), 256, stream)
    graph = card.made("cuGraphCreate", 0)
    left = card.add_node(graph, x, y, 1.0)
    right = card.add_node(graph, x, z, 2.0)
    card.add_node(graph, y, z, 3.0, [left, right] if joins else [left])
    card.call("cuGraphLaunch", card.instantiate(graph), stream)
    card.call("cuMemcpyDtoHAsync_v2", result, z, 256, stream)
    card.call("cuStreamSynchronize", stream)
    assert len(card.fake.problems()) == (0 if joins else 1)
    if joins:
        assert card.read(result, 64) == ramp(4.0)


def test_launches_of_one_executable_follow_each_other(card: Card) -> None:
    first, second, x, y = card.stream(), card.stream(), card.alloc(64), card.alloc(64)
    card.call("cuMemcpyHtoDAsync_v2", x, card.floats(ramp()), 256, first)
    card.call("cuStreamSynchronize", first)
    graph = card.made("cuGraphCreate", 0)
    card.add_node(graph, x, y, 1.0)
    executable = card.instantiate(graph)
    for stream in (first, second):
        card.call("cuGraphLaunch", executable, stream)
    for stream in (first, second):
        card.call("cuStreamSynchronize", stream)


def test_a_flag_that_the_host_polls_orders_what_lies_before_it(card: Card) -> None:
    stream, memory = card.stream(), card.floats([0.0, 0.0])
    card.launch(stream, "om_flag", Params(flag=memory, data=memory + 4, value=ctypes.c_int(7)), threads=1)
    flag = ctypes.c_int.from_address(memory)
    for _ in range(100):
        card.fake.host(memory, 4, POLLS)
        if flag.value == 7:
            break
    assert flag.value == 7
    card.fake.host(memory + 4, 4, READS)
    assert ctypes.c_int.from_address(memory + 4).value == 7


def test_data_behind_a_flag_that_is_not_polled_is_found(card: Card) -> None:
    stream, memory = card.stream(), card.floats([0.0, 0.0])
    card.launch(stream, "om_flag", Params(flag=memory, data=memory + 4, value=ctypes.c_int(7)), threads=1)
    card.fake.host(memory + 4, 4, READS)
    card.call("cuStreamSynchronize", stream)
    assert "om_flag" in only_problem(card.fake)


def test_queries_let_the_card_go_on(card: Card) -> None:
    stream, x = card.stream(), card.alloc(64)
    card.call("cuMemsetD8Async", x, 0, 256, stream)
    codes = [card.fake.library.cuStreamQuery(ctypes.c_uint64(stream)) for _ in range(3)]
    assert codes == [600, 0, 0]


def test_where_launches_are_batched_polling_alone_does_not_begin_them(card: Card) -> None:
    card.fake.set(batches=1)
    stream, memory = card.stream(), card.floats([0.0, 0.0])
    flag = ctypes.c_int.from_address(memory)
    card.launch(stream, "om_flag", Params(flag=memory, data=memory + 4, value=ctypes.c_int(7)), threads=1)
    for _ in range(10):
        card.fake.host(memory, 4, POLLS)
    assert flag.value == 0
    card.fake.library.cuStreamQuery(ctypes.c_uint64(stream))
    assert flag.value == 7


def test_a_pageable_source_is_read_at_the_call_and_waits(card: Card) -> None:
    stream, x, result = card.stream(), card.alloc(64), card.floats([0.0] * 64)
    pageable = (ctypes.c_float * 64)(*ramp())
    card.call("cuMemcpyHtoDAsync_v2", x, ctypes.addressof(pageable), 256, stream)
    assert card.fake.count("synchronizations") == 1
    ctypes.memset(pageable, 0, 256)
    card.call("cuMemcpyDtoHAsync_v2", result, x, 256, stream)
    card.call("cuStreamSynchronize", stream)
    assert card.read(result, 64) == ramp()


def test_page_locks_can_be_refused(card: Card) -> None:
    card.fake.set(lockable=4096, lock_error=801)
    card.made("cuMemHostAlloc", 4096, 3)
    with pytest.raises(DriverError, match="cuMemHostAlloc: 801"):
        card.made("cuMemHostAlloc", 1, 3)


def test_pages_are_not_locked_twice(card: Card) -> None:
    at = card.floats(ramp())
    with pytest.raises(DriverError, match="cuMemHostRegister_v2: 712"):
        card.call("cuMemHostRegister_v2", at + 128, 64, 3)


def test_memory_of_the_card_ends(card: Card) -> None:
    card.fake.set(vram=1 << 20, vram_elsewhere=1 << 19)
    kept = card.alloc(1 << 16)
    with pytest.raises(DriverError, match="cuMemAlloc_v2: 2"):
        card.alloc(1 << 17)
    card.call("cuMemFree_v2", kept)
    card.alloc(1 << 17)


def test_a_call_fails_when_a_test_wants_it(card: Card) -> None:
    card.fake.fail("cuMemAlloc_v2", 2, after=1)
    card.alloc(1)
    with pytest.raises(DriverError, match="cuMemAlloc_v2: 2"):
        card.alloc(1)
    card.alloc(1)


def test_a_card_that_is_lost_stays_lost(card: Card) -> None:
    stream, x = card.stream(), card.alloc(64)
    card.fake.set(lost_after=1)
    for _ in range(2):
        card.call("cuMemsetD8Async", x, 0, 256, stream)
    with pytest.raises(DriverError, match="cuStreamSynchronize: 719"):
        card.call("cuStreamSynchronize", stream)
    with pytest.raises(DriverError, match="cuMemAlloc_v2: 719"):
        card.alloc(1)


def test_a_thread_without_a_context_is_refused(fake: FakeDriver) -> None:
    card = Card(fake)
    card.call("cuCtxSetCurrent", 0)
    with pytest.raises(DriverError, match="cuMemAlloc_v2: 201"):
        card.alloc(1)


def test_with_aliases_the_card_does_not_reach_addresses_of_the_host(card: Card) -> None:
    card.fake.set(aliases=1)
    stream, source, to = card.stream(), card.floats(ramp()), card.floats([0.0] * 64)
    devices = [card.made("cuMemHostGetDevicePointer_v2", at, 0) for at in (source, to)]
    assert devices[0] != source
    card.add(stream, *devices, 1.0)
    card.call("cuStreamSynchronize", stream)
    assert card.read(to, 64) == ramp(1.0)
    card.add(stream, source, devices[1], 1.0)
    card.call("cuStreamSynchronize", stream)
    assert "the card does not reach them" in only_problem(card.fake)


def test_late_copies_come_after_all_kernels_that_do_not_wait_for_them(fake: FakeDriver) -> None:
    card = Card(fake)
    fake.set(order=2, late_copies=1)
    copies, compute, x, y = card.stream(), card.stream(), card.alloc(64), card.alloc(64)
    shared = card.floats([0.0] * 64)
    card.call("cuMemcpyHtoDAsync_v2", x, shared, 256, copies)
    card.call("cuMemsetD8Async", y, 0, 256, compute)
    for _ in range(3):
        card.add(compute, y, y, 1.0)
    card.call("cuStreamSynchronize", compute)
    assert fake.library.cuStreamQuery(ctypes.c_uint64(copies)) == 600


def test_without_kernels_only_named_ones_run(card: Card) -> None:
    card.fake.set(no_kernels=1)
    card.fake.execute("om_flag")
    stream, memory = card.stream(), card.floats([0.0, 0.0])
    huge = card.alloc(1 << 30)
    card.add(stream, huge, huge, 1.0)
    card.launch(stream, "om_flag", Params(flag=memory, data=memory + 4, value=ctypes.c_int(7)), threads=1)
    card.call("cuStreamSynchronize", stream)
    assert ctypes.c_int.from_address(memory).value == 7
    assert card.fake.count("kernels") == 2


def test_the_host_cannot_touch_the_cards_memory(card: Card) -> None:
    card.fake.host(card.alloc(64), 4, READS)
    assert "the host touches byte 0 of allocation 0" in only_problem(card.fake)


@pytest.mark.parametrize(("mode", "breaks"), [(0, True), (1, False), (2, False)])
def test_another_threads_query_breaks_a_capture_in_global_mode(card: Card, mode: int, breaks: bool) -> None:
    stream, x, result = card.stream(), card.floats(ramp()), card.floats([0.0] * 64)
    event = card.made("cuEventCreate", 2)
    card.kernel("om_add")  # a module that is loaded breaks a capture, too
    codes: list[int] = []

    def query() -> None:
        card.call("cuCtxSetCurrent", card.context)
        codes.append(card.fake.library.cuEventQuery(ctypes.c_uint64(event)))

    card.call("cuStreamBeginCapture_v2", stream, ctypes.c_int(mode))
    card.add(stream, x, result, 1.0)
    card.add(stream, result, result, 1.0)
    thread = threading.Thread(target=query)
    thread.start()
    thread.join()
    assert codes == [900 if breaks else 0]
    if breaks:
        with pytest.raises(DriverError, match="cuStreamEndCapture: 901"):
            card.call("cuStreamEndCapture", stream, ctypes.byref(ctypes.c_uint64()))
        return
    graph = ctypes.c_uint64()
    card.call("cuStreamEndCapture", stream, ctypes.byref(graph))
    card.call("cuGraphLaunch", card.instantiate(graph.value), stream)
    card.call("cuStreamSynchronize", stream)
    assert card.read(result, 64) == ramp(2.0)
