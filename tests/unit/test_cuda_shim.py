"""The CPU stand-in for CUDA C++, which the tests of the card's kernels rely on."""

import ctypes
import subprocess
import sys
from typing import Any

import pytest
from support.cuda import shim

pytestmark = pytest.mark.skipif(not shim.has_compiler(), reason="no C++ compiler")
PROBE = shim.SHIM / "probe.cu"
SEEDS = (0, 1, 2, 7)


def struct(**fields: Any) -> ctypes.Structure:
    kinds = {int: ctypes.c_int, float: ctypes.c_float}
    types = [(name, kinds.get(type(value), ctypes.c_void_p)) for name, value in fields.items()]
    made = type("Params", (ctypes.Structure,), {"_fields_": types})()
    for name, value in fields.items():
        setattr(made, name, value if type(value) in kinds else ctypes.addressof(value))
    made.kept = fields
    return made


def floats(count: int) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * count)(*range(count))


@pytest.mark.parametrize("mode", ["plain", "race"])
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_meet_at_barriers(mode: str, seed: int) -> None:
    source, result = floats(256), floats(256)
    params = struct(**{"from": source, "to": result, "skips_barrier": 0, "reads_far": 0})
    shim.load(PROBE, mode=mode).launch("om_reverse", (4,), (64,), params, seed=seed)
    assert list(result) == [64 * (i // 64) + 63 - i % 64 for i in range(256)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_is_found_in_every_order(seed: int) -> None:
    params = struct(**{"from": floats(64), "to": floats(64), "skips_barrier": 1, "reads_far": 0})
    with pytest.raises(shim.ShimError, match=r"kernels\.cu:\d+: thread \d+ of block 0 (reads|writes) shared memory"):
        shim.load(PROBE, mode="race").launch("om_reverse", (1,), (64,), params, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_one_block_reads_of_another_is_found(seed: int) -> None:
    params = struct(**{"from": floats(192), "to": floats(192), "skips_barrier": 0, "reads_far": 1})
    with pytest.raises(shim.ShimError, match=r"of block \d.* memory that thread \d+ of block \d"):
        shim.load(PROBE, mode="race").launch("om_reverse", (3,), (64,), params, seed=seed)


@pytest.mark.parametrize("skips", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_of_a_warp_order_its_lanes(seed: int, skips: int) -> None:
    result = (ctypes.c_int * 64)()
    params = struct(to=result, skips_warp_barrier=skips)
    library = shim.load(PROBE, mode="race")
    if skips:
        with pytest.raises(shim.ShimError, match="writes shared memory that thread"):
            library.launch("om_turns", (1,), (64,), params, seed=seed)
        return
    library.launch("om_turns", (1,), (64,), params, seed=seed)
    assert list(result) == [t // 32 * 64 + (t + 2) % 32 for t in range(64)]


def sums(seed: int, *, skips_fence: int) -> int:
    source = (ctypes.c_int * 128)(*range(128))
    parts, count, total = (ctypes.c_int * 4)(), ctypes.c_int(), ctypes.c_int()
    params = struct(**{"from": source}, parts=parts, count=count, total=total, skips_fence=skips_fence)
    shim.load(PROBE, mode="race").launch("om_sum", (4,), (32,), params, seed=seed)
    return total.value


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_and_fences_order_blocks(seed: int) -> None:
    assert sums(seed, skips_fence=0) == sum(range(128))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_fence_is_found(seed: int) -> None:
    with pytest.raises(shim.ShimError, match="nothing orders them"):
        sums(seed, skips_fence=1)


def test_shared_memory_is_poisoned() -> None:
    result = (ctypes.c_int * 32)()
    shim.load(PROBE).launch("om_diverge", (1,), (32,), struct(kind=0, to=result))
    assert list(result) == [-1] * 32


@pytest.mark.parametrize(
    ("kind", "threads", "message"),
    [(1, 64, "threads wait at different barriers: lines"), (2, 32, "shuffles, and others of its warp do not come")],
)
def test_threads_that_do_not_meet_are_an_error(kind: int, threads: int, message: str) -> None:
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(shim.ROOT / "tests")!r})
from support.cuda import shim
class Params(ctypes.Structure): _fields_ = [("kind", ctypes.c_int), ("to", ctypes.c_void_p)]
result = (ctypes.c_int * 64)()
shim.load({str(PROBE)!r}).launch("om_diverge", (1,), ({threads},), Params({kind}, ctypes.addressof(result)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert message in done.stderr


def test_a_struct_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="om_flag takes 24 bytes of parameters, not 4"):
        shim.load(PROBE).launch("om_flag", (1,), (1,), struct(flag=1))


def test_a_text_that_does_not_compile_shows_the_compilers_words() -> None:
    with pytest.raises(shim.ShimError, match="nonesuch"):
        shim.build('extern "C" __global__ void om_x(const int p) { nonesuch(); }')


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("__float2int_rn(p.value)", {2.5: 2, 3.5: 4, -2.5: -2, 3e9: 2**31 - 1, -3e9: -(2**31), float("nan"): 0}),
        ("__float2int_rz(p.value)", {2.9: 2, -2.9: -2, float("inf"): 2**31 - 1, float("nan"): 0}),
    ],
)
def test_conversions_saturate_as_on_a_card(expression: str, expected: dict[float, int]) -> None:
    text = f"""struct params {{ float value; int *to; }};
    extern "C" __global__ void om_convert(const params p) {{ *p.to = {expression}; }}"""
    library = shim.ShimLibrary(shim.build(text))
    for value, wanted in expected.items():
        result = ctypes.c_int(7)
        library.launch("om_convert", (1,), (1,), struct(value=float(value), to=result))
        assert result.value == wanted, value


def test_bytes_are_permuted_as_prmt_does() -> None:
    text = """struct params { unsigned *to; };
    extern "C" __global__ void om_permute(const params p) {
        p.to[0] = shim_prmt(0x8899aabb, 0x44556677, 0x7610), p.to[1] = shim_prmt(0x80, 0, 0x0008);
        p.to[2] = __byte_perm(0x8899aabb, 0x44556677, 0x5f40), p.to[3] = (unsigned)__dp4a(0x01ff7f80, 0x02020202, 5);
    }"""
    result = (ctypes.c_uint * 4)()
    shim.ShimLibrary(shim.build(text)).launch("om_permute", (1,), (1,), struct(to=result))
    assert [hex(value) for value in result[:3]] == ["0x4455aabb", "0x808080ff", "0x664477bb"]
    assert result[3] == 2 * (1 - 1 + 127 - 128) + 5
