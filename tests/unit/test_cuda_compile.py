"""What compilers make of the card's kernels: how that is read, what was found for all, and a few compiled here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cuda import sass, specializations
from support.cuda.specializations import ARCHITECTURES, MODELS, ROWS

from offload_moe.card.cubins import KERNELS, Compiler
from offload_moe.card.nvrtc import load_nvrtc
from offload_moe.errors import DevicePassUnavailable

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-30-cuda-compile.json"
REMARKS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'om_first_0' for 'sm_86'
ptxas info    : Function properties for om_first_0
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 9728 bytes smem, 480 bytes cmem[0]
ptxas info    : Compiling entry function 'om_quantize_1' for 'sm_86'
ptxas info    : Function properties for om_quantize_1
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 25 registers, used 0 barriers, 376 bytes cmem[0]
"""
LISTING = """	.section	.text.om_first_0,"ax",@progbits
.text.om_first_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_2:
        /*0020*/                   LDG.E.NA.LTC128B.128 R8, [R2.64] ;
        /*0030*/                   LDG.E.NA.LTC128B.128 R12, [R2.64+0x40] ;
        /*0040*/                   LD.E.U8 R16, [R2.64] ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3) ;
"""


def test_registers_and_spills_are_read() -> None:
    assert sass.resources(REMARKS) == {
        "om_first_0": {"stack": 8, "spills": 28, "registers": 64, "shared": 9728},
        "om_quantize_1": {"stack": 0, "spills": 0, "registers": 25, "shared": 0},
    }


def test_the_loop_over_codes_is_the_innermost_one_that_loads_them() -> None:
    costs = sass.costs(sass.parse(LISTING)["om_first_0"])
    assert costs == {
        "instructions": 4,
        "code_bytes": 1024,
        "loop_spills": 0,
        "generic_loads": 1,
        "loads_1": 1,
        "loads_16": 2,
    }


def test_the_issue_bound_is_that_of_the_schedulers() -> None:
    card = sass.Card(architecture=86, multiprocessors=10, ghz=2.0, gb_per_s=100)
    assert sass.issue_bound(card, {"instructions": 400, "code_bytes": 4096}) == pytest.approx(10 * 4 * 2.0 * 10.24)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"spills": 44}, ["44 bytes of spills"]),
        ({"spills": 8, "loop_spills": 2}, ["2 spills in the loop over codes"]),
        ({"registers": 129}, ["129 registers, more than 128"]),
        ({"code_bytes": 0}, ["its codes are not loaded 16 bytes at a time"]),
    ],
)
def test_what_is_wrong_with_a_kernel_is_found(change: dict[str, int], expected: list[str]) -> None:
    costs = {"spills": 0, "registers": 96, "instructions": 400, "code_bytes": 4096} | change
    assert sass.problems("FIRST", 1, costs) == expected


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def all_kernels(row_counts: list[int]) -> set[str]:
    return {
        " ".join(line)
        for model in MODELS.values()
        for rows in row_counts
        for line in (*specializations.kernels(model, rows), *specializations.attention(model, rows))
    } | set(specializations.residency()[1])


def test_every_kernel_was_compiled_for_every_architecture_without_a_problem() -> None:
    found = results()
    assert found["problems"] == []
    assert set(ROWS) >= set(found["rows_of_activations"]) >= {1}
    expected = {(kernel, a) for kernel in all_kernels(found["rows_of_activations"]) for a in ARCHITECTURES}
    assert {(row[0], row[1]) for row in found["rows"]} == expected


def test_five_cards_can_issue_twice_what_their_memory_reads() -> None:
    found = results()["issue_bounds"]
    assert found.keys() == sass.CARDS.keys()
    assert all(bound["over_memory"] >= 2 for bound in found.values())


def nvrtc_path() -> str | None:
    try:
        load_nvrtc(architecture=86, driver_version=99000)
    except DevicePassUnavailable:
        return None
    return "found"


@pytest.mark.skipif(nvrtc_path() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")
@pytest.mark.parametrize("architecture", [75, 120])
def test_experts_compile_without_spills(architecture: int) -> None:
    nvrtc = load_nvrtc(architecture=architecture, driver_version=99000)
    lines = [line for line in specializations.kernels(MODELS["Qwen3-30B-A3B"], 1) if line[0] in ("FIRST", "SECOND")]
    text, names = specializations.program(lines, ("kernels.cuh",))
    cubin, remarks = nvrtc.compile(text, [*Compiler(nvrtc, architecture).options(), "--ptxas-options=-v"])
    found = sass.resources(remarks)
    assert cubin[:4] == b"\x7fELF"
    assert found.keys() == names.keys()
    assert [problem for name in found for problem in sass.problems(names[name][0], 1, found[name])] == []
    assert [name for name in found if found[name]["spills"]] == []


@pytest.mark.skipif(nvrtc_path() is None, reason="no NVRTC: pip install nvidia-cuda-nvrtc")
def test_nvrtc_names_the_file_and_the_line_of_an_error() -> None:
    nvrtc = load_nvrtc(architecture=86, driver_version=99000)
    text = '#include "kernels.cuh"\nOM_DEFINE_NORM(om_norm, nonesuch)\n'
    with pytest.raises(DevicePassUnavailable, match=r"kernels\.cu\(2\): error: .*nonesuch"):
        Compiler(nvrtc, 86, KERNELS / "nonesuch").image(text)


def test_the_script_lists_its_flags() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/cuda_compile"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--architectures" in done.stdout
