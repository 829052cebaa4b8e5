"""The doctor's verdicts on machines of every kind, and what its report keeps to itself."""

import getpass
import json
import os
import platform
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from offload_moe.doctor import Check, Redactor, device_kernels, examine, machine, memory_speed, storage
from offload_moe.doctor import device as device_checks
from offload_moe.doctor.check import judge
from offload_moe.doctor.device import Device, check_device, check_link, check_torch_build, check_vram
from offload_moe.doctor.examination import guarded
from offload_moe.doctor.outcome import run_check
from offload_moe.doctor.versions import check_package
from offload_moe.errors import TransferError
from offload_moe.memory.nvidia import Nvidia, find_nvidia
from offload_moe.memory.unused_card import build_of_torch
from offload_moe.native import kernels
from offload_moe.native.kernels import Reads
from tests.support.cli import load_cli
from tests.support.disk import is_direct, pread

CARD = Nvidia(driver="580.1", name="NVIDIA GeForce RTX 3060", link_generation=4, lanes=16, max_lanes=16)
GIB = 1 << 30


def device(
    capability: tuple[int, int] | None = (8, 6), total: int = 12 * GIB, free: int = 11 * GIB + GIB // 2
) -> Device:
    return Device(name="NVIDIA GeForce RTX 3060", total_bytes=total, free_bytes=free, capability=capability)


def test_a_verdict_that_is_not_ok_says_what_to_do() -> None:
    with pytest.raises(AssertionError):
        Check(name="x", verdict="warning", found="y")
    with pytest.raises(AssertionError):
        Check(name="x", verdict="ok", found="y", fix="z")


def test_a_cpu_build_of_torch_beside_a_card_is_a_problem_with_the_install_line() -> None:
    check = check_torch_build(CARD, None, None, environ={}, system="Linux")
    assert check.verdict == "problem"
    assert "CPU-only build, NVIDIA GeForce RTX 3060, driver 580.1" in check.found
    release = torch.__version__.partition("+")[0]
    assert f'python -m pip install --force-reinstall "torch=={release}"' in check.fix
    assert "pytorch.org" in check_torch_build(CARD, None, None, environ={}, system="Windows").fix


@pytest.mark.parametrize(
    ("nvidia", "build", "found", "environ", "verdict", "fix"),
    [
        (None, None, None, {}, "ok", ""),
        (CARD, "CUDA 13.0", device(), {}, "ok", ""),
        (None, "ROCm 7.0", device(None), {}, "ok", ""),
        (CARD, "CUDA 13.0", None, {}, "problem", "Update the driver"),
        (CARD, "CUDA 13.0", None, {"CUDA_VISIBLE_DEVICES": ""}, "warning", "hides the GPU"),
        (CARD, "CUDA 13.0", None, {"CUDA_VISIBLE_DEVICES": "-1"}, "warning", "hides the GPU"),
        (CARD, "CUDA 13.0", None, {"CUDA_VISIBLE_DEVICES": "0"}, "problem", "Update the driver"),
        (Nvidia(), None, None, {}, "problem", "CUDA build"),
    ],
)
def test_torch_and_the_card(
    nvidia: Nvidia | None, build: str | None, found: Device | None, environ: dict[str, str], verdict: str, fix: str
) -> None:
    check = check_torch_build(nvidia, build, found, environ=environ, system="Linux")
    assert check.verdict == verdict
    assert fix in check.fix


def test_what_the_driver_says(tmp_path: Path) -> None:
    proc = tmp_path / "version"
    assert find_nvidia(proc, lambda _: None) is None
    proc.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 2024\nGCC version: 12.2\n")
    assert find_nvidia(proc, lambda _: None) == Nvidia(driver="550.54.14")
    answer = "NVIDIA GeForce RTX 3060, 580.1, 4, 8, 16\nNVIDIA T4, 580.1, 3, 16, 16\n"
    card = Nvidia(name=CARD.name, driver="580.1", link_generation=4, lanes=8, max_lanes=16)
    assert find_nvidia(tmp_path / "none", lambda _: answer) == card
    assert check_link(card).verdict == "warning"
    assert check_link(CARD).verdict == "ok"
    virtual = find_nvidia(tmp_path / "none", lambda _: "GRID T4, 580.1, [N/A], [N/A], [N/A]\n")
    assert virtual is not None
    assert virtual.lanes is None


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "Card, 1.2, 4, 16, 16"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_nvidia(tmp_path / "none") == Nvidia(
        name="Card", driver="1.2", link_generation=4, lanes=16, max_lanes=16
    )
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert find_nvidia(tmp_path / "none") is None


def test_the_device() -> None:
    assert check_device(None).verdict == "ok"
    assert check_device(device()).verdict == "ok"
    assert check_device(device(None)).verdict == "ok"
    turing = check_device(device((7, 5)))
    assert (turing.verdict, "--dtype fp32" in turing.fix) == ("warning", True)
    assert check_vram(device()).verdict == "ok"
    assert "desktop" in check_vram(device(free=9 * GIB)).fix
    assert check_vram(device(total=4 * GIB, free=3 * GIB + GIB // 2)).verdict == "warning"
    assert check_vram(device(free=GIB)).verdict == "problem"


def test_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=50 * GIB))
    for free, verdict, limited in ((50 * GIB, "ok", False), (3 * GIB, "warning", True), (GIB // 2, "problem", True)):
        monkeypatch.setattr(machine, "free_ram", lambda free=free: free)
        check = machine.check_ram()
        assert (check.verdict, "container or group limit" in check.found) == (verdict, limited)


def test_page_lock_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_page_lock_limit(None, has_device=True).verdict == "ok"
    assert machine.check_page_lock_limit(8 << 20, has_device=False).verdict == "ok"
    monkeypatch.setattr(machine, "is_wsl", lambda: True)
    check = machine.check_page_lock_limit(64 << 10, has_device=True)
    assert (check.verdict, check.numbers["limit_bytes"]) == ("warning", 64 << 10)
    limit = machine.page_lock_limit()
    assert limit is None or limit > 0


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_power(SimpleNamespace(power_plugged=False)).verdict == "warning"
    assert machine.check_power(SimpleNamespace(power_plugged=True)).verdict == "ok"
    assert machine.is_wsl("5.15.153.1-microsoft-standard-WSL2")
    assert not machine.is_wsl("6.8.0-45-generic")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert "OMP_NUM_THREADS" in machine.check_processor().fix


def test_versions() -> None:
    needed = Requirement("torch>=2.13,<2.15")
    assert check_package("torch", "2.13.0+cpu", needed).verdict == "ok"
    assert check_package("torch", "2.13.0", None).verdict == "ok"
    other = check_package("torch", "2.12.1", needed)
    assert (other.verdict, '"torch<2.15,>=2.13"' in other.fix) == ("warning", True)
    assert check_package("torch", None, needed).verdict == "problem"


def mount(monkeypatch: pytest.MonkeyPatch, kind: str, at: Path) -> None:
    parts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(at), fstype=kind)]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: parts)  # noqa: A006


@pytest.mark.parametrize(
    ("kind", "verdict"), [("ext4", "ok"), ("xfs", "ok"), ("nfs4", "warning"), ("9p", "warning"), ("tmpfs", "warning")]
)
def test_file_systems(kind: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(monkeypatch, kind, tmp_path.resolve())
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=500 * GIB))
    check = storage.check_file_system("cache folder", tmp_path / "not" / "there" / "yet")
    assert (check.verdict, check.found) == (verdict, f"{kind}, 500.0 GiB free")
    assert storage.file_system(Path("/")) == "ext4"
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=GIB))
    assert storage.check_file_system("cache folder", tmp_path).verdict == "warning"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert storage.check_file_system("cache folder", tmp_path).verdict == "problem"


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FILE_BYTES", 16 << 20)
    monkeypatch.setattr(storage, "PIECE_BYTES", 4 << 20)
    monkeypatch.setattr(storage, "MEASURE_S", 0.1)
    check = storage.check_disk_speed(tmp_path / "cache")
    assert check.numbers["disk_bytes_per_s"] > 0
    assert list(tmp_path.iterdir()) == []
    for rate, verdict in ((5e9, "ok"), (5e8, "warning"), (8e7, "problem")):
        speed = storage.DiskSpeed(bytes_per_s=rate, is_direct=True, file_bytes=1 << 30)
        monkeypatch.setattr(storage, "measure_read", lambda _, speed=speed: speed)
        assert storage.check_disk_speed(tmp_path).verdict == verdict
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert storage.check_disk_speed(tmp_path).found == "not measured"


def test_a_file_that_takes_long_to_write_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("FILE_BYTES", 1 << 20), ("LEAST_FILE_BYTES", 256 << 10), ("PIECE_BYTES", 64 << 10)):
        monkeypatch.setattr(storage, name, size)
    for seconds, num_bytes in ((0.0, 1 << 20), (10.0, 256 << 10), (3.0, 320 << 10)):
        with (tmp_path / "noise").open("wb") as file:
            storage.write_noise(file.fileno(), iter(seconds * call for call in range(100)).__next__)
        assert (tmp_path / "noise").stat().st_size == num_bytes


def test_what_memory_holds_of_a_file_does_not_make_its_disk_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache is not looked at, and no block is read twice, which a drive would have kept."""
    path = tmp_path / "records"
    path.write_bytes(os.urandom(5 << 20))
    path.read_bytes()
    reads: list[tuple[bool, int]] = []

    def read_at(descriptor: int, address: int, num_bytes: int, offset: int) -> int:
        reads.append((is_direct(descriptor), offset))
        return pread(descriptor, address, num_bytes, offset)

    class WatchedReads(Reads):
        def trust(self) -> None:
            super().trust()
            self.read_with(read_at)

    monkeypatch.setattr(storage, "Reads", WatchedReads)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(storage, "MEASURE_S", 60.0)
    speed = storage.measure_read(path)
    assert speed.file_bytes == 5 << 20
    assert {direct for direct, _ in reads} == {speed.is_direct}
    assert sorted(offset for _, offset in reads) == [block << 20 for block in range(5)]


def test_the_self_test_says_what_was_measured_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    measured = judge("RAM read", "32.3 GB/s")
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [("RAM read", lambda: measured)])
    monkeypatch.setattr(
        "offload_moe.doctor.self_test.self_test", lambda *_: iter([run_check("store", lambda: "whole")])
    )
    load_cli().main(["doctor", "--self-test"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "32.3 GB/s" in line or "whole" in line] == ["ok", "pass"]


def test_a_rate_is_bytes_of_the_best_trial_by_its_seconds() -> None:
    times = iter([0.0, 4.0, 10.0, 12.0, 20.0, 25.0])
    assert memory_speed.fastest_rate(100, lambda: None, lambda: next(times)) == 50.0


def test_bandwidths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_speed, "BUFFER_BYTES", 1 << 20)
    assert memory_speed.check_memory_read().numbers["ram_bytes_per_s"] > 1e8
    assert memory_speed.check_kernel_speed().numbers["kernel_bytes_per_s"] > 1e7
    monkeypatch.setattr(memory_speed, "fastest_rate", lambda *_: 1e9)
    assert memory_speed.check_memory_read().verdict == "warning"


def test_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: what is copied and how it is judged, not how fast."""
    monkeypatch.setattr(memory_speed, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    refused = memory_speed.check_transfers(torch.device("cpu"))
    assert [check.name for check in refused] == ["page-locking", "H2D, pageable", "D2H, pageable"]
    assert (refused[0].verdict, "ulimit -l" in refused[0].fix) == ("warning", True)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, pin_memory=False, **rest: ones(*size, **rest))
    monkeypatch.setattr(memory_speed, "fastest_rate", lambda *_: 3e9)
    checks = {check.name: check for check in memory_speed.check_transfers(torch.device("cpu"))}
    assert set(checks) == {"page-locking"} | {f"{way}, {kind}" for way in ("H2D", "D2H") for kind in KINDS}
    assert checks["H2D, page-locked"].verdict == "warning"
    assert checks["H2D, pageable"].verdict == "ok"


def test_device_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where bitsandbytes has them too."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check = device_kernels.check_device_kernels(torch.device("cpu"), dtype)
        assert check.verdict == "ok"
        assert (check.numbers["error"] > 0) == (dtype != torch.float32)
    right = device_kernels.record_linear
    monkeypatch.setattr(device_kernels, "record_linear", lambda *arguments: 1.05 * right(*arguments))
    assert "Answers would be wrong" in device_kernels.check_device_kernels(torch.device("cpu"), torch.float32).fix

    def missing(*_: object) -> torch.Tensor:
        raise NotImplementedError("Could not run 'bitsandbytes::gemm_4bit' with arguments from the 'CUDA' backend.")

    monkeypatch.setattr(device_kernels, "record_linear", missing)
    check = device_kernels.check_device_kernels(torch.device("cpu"), torch.float32)
    assert (check.verdict, "from the 'CUDA' backend" in check.found) == ("problem", True)
    assert "pip install" in check.fix


KINDS = ("page-locked", "pageable")


def test_kernel_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "num_threads", lambda: 2)
    for name, verdict in (("avx2", "ok"), ("portable", "warning")):
        monkeypatch.setattr(kernels, "instruction_set", lambda name=name: name)
        assert memory_speed.check_kernel_paths().verdict == verdict


def test_a_check_that_fails_is_a_finding() -> None:
    def fail() -> Check:
        raise TransferError("Reading /x failed:\ninput/output error.")

    (check,) = guarded("disk read", fail)
    assert check.verdict == "problem"
    assert check.found == "could not be examined: TransferError: Reading /x failed: input/output error."


def test_the_whole_examination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [])
    asked = [check.name for check in examine()]
    for name in (
        "program",
        "torch",
        "RAM",
        "torch on the GPU",
        "device",
        "page-lock limit",
        "cache folder",
        "CPU kernels",
    ):
        assert name in asked
    measured = [SimpleNamespace(name="disk read"), SimpleNamespace(name="RAM read")]
    monkeypatch.setattr(
        "offload_moe.doctor.examination.measurements", lambda _: [(m.name, lambda m=m: [m]) for m in measured]
    )
    assert {check.name for check in examine()} == {*asked, "disk read", "RAM read"}


PRIVATE = {
    "HOME": "/home/alice.liddell",
    "USER": "alice.liddell",
    "HF_TOKEN": "a-secret-of-hers",
    "HUGGING_FACE_HUB_TOKEN": "hf_AbCdEfGhIjKlMnOp",
    "SUDO_USER": "dormouse",
    "DB_PASSWORD": "tea-at-six",
}
TEXTS = [
    "Reading /home/alice.liddell/.cache/offload_moe/x failed",
    "on /mnt/alice.liddell",
    "user Alice.Liddell at wonderland.example.org or WONDERLAND",
    "dormouse sleeps; ~alice.liddell/x ~/y",
    "token a-secret-of-hers, hf_AbCdEfGhIjKlMnOp, hf_ZyXwVuTsRqPoNm, tea-at-six",
    r"C:\Users\alice.liddell\models and \\wonderland\share",
    "https://alice.liddell:pw@wonderland.example.org/simple",
    "'/data/private project/x' (/opt/models/secret)",
]


def test_a_report_keeps_secrets_names_and_paths_to_itself() -> None:
    redact = Redactor(environ=PRIVATE, hosts=["wonderland.example.org", "wonderland"])
    text = "\n".join(map(redact, TEXTS)).lower()
    for private in (
        *("alice", "liddell", "wonderland", "secret-of", "hf_", "tea-at", "dormouse", "/home", "/mnt", "/data", "/opt"),
        *("users", "share", "models"),
    ):
        assert private not in text, private
    for kept in (
        "838 MB/s, direct, 4 reads of 4 MiB in flight, at random places in 1.0 GiB",
        "PCIe 4 x16; bf16 and/or fp16, H2D/D2H",
        'python -m pip install --force-reinstall "torch==2.13.0"',
        "NVIDIA GeForce RTX 3060, driver 580.1, 11.5 GiB free of 12.0 GiB",
    ):
        assert redact(kept) == kept


def test_a_report_of_this_machine_names_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in PRIVATE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "node", lambda: "wonderland.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice.liddell")
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [("disk read", fail_privately)])
    assert load_cli().main(["doctor", "--report", str(tmp_path / "report.txt")]) == 1
    report = (tmp_path / "report.txt").read_text()
    assert "could not be examined: TransferError: Reading <path> failed" in report
    for private in ("alice", "wonderland", "secret-of", "hf_", "dormouse", str(tmp_path), "/home"):
        assert private not in report.lower()
    out = capsys.readouterr().out
    assert "/home/alice.liddell" in out  # at home the path is what one needs


def fail_privately() -> Check:
    raise TransferError(" ".join(TEXTS))


def test_the_document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [])
    status = load_cli().main(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    problems = [check for check in document["checks"] if check["verdict"] == "problem"]
    assert status == bool(problems)
    assert document["is_well"] == (not problems)
    assert document["self_test"] is None
    for check in document["checks"]:
        assert set(check) == {"name", "verdict", "found", "fix", "numbers"}
        assert (check["verdict"] == "ok") == (check["fix"] is None)
    assert load_cli().main(["doctor", "--store", str(tmp_path / "nowhere")]) == 1
    assert "is not an expert store" in capsys.readouterr().err


def test_a_problem_leaves_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("offload_moe.doctor.examination.find_nvidia", lambda: CARD)
    monkeypatch.setattr("offload_moe.doctor.examination.measurements", lambda _: [])
    monkeypatch.setattr("offload_moe.doctor.examination.build_of_torch", lambda: None)
    monkeypatch.setattr("offload_moe.doctor.examination.find_device", lambda _: None)
    assert load_cli().main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem  torch on the GPU  CPU-only build" in out
    assert "-> This torch cannot use the GPU." in out
    assert build_of_torch() is None or torch.version.cuda or torch.version.hip


def test_a_card_is_found_and_examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With torch's answers about a card in place of a card."""
    cuda = torch.device("cuda:0")
    properties = SimpleNamespace(name="NVIDIA T4", major=7, minor=5)
    module = SimpleNamespace(get_device_properties=lambda _: properties)
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(device_checks, "total_device_memory", lambda _: 16 * GIB)
    monkeypatch.setattr(device_checks, "free_device_memory", lambda _: 15 * GIB)
    monkeypatch.setattr("offload_moe.doctor.examination.compute_device", lambda: cuda)
    monkeypatch.setattr("offload_moe.doctor.examination.find_nvidia", lambda: CARD)
    transfers: list[torch.device] = []
    monkeypatch.setattr(memory_speed, "check_transfers", lambda where: transfers.append(where) or [])
    for slow in ("check_memory_read", "check_kernel_speed"):
        monkeypatch.setattr(memory_speed, slow, list)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    used: list[tuple[torch.device, torch.dtype]] = []
    monkeypatch.setattr("offload_moe.doctor.examination.check_device_kernels", lambda *given: used.append(given) or [])
    monkeypatch.setattr(storage, "check_disk_speed", lambda *_: [])
    found = {check.name: check for check in examine()}
    assert found["device"].found == "NVIDIA T4, compute capability 7.5, without bf16"
    assert found["VRAM"].found == "15.0 GiB free of 16.0 GiB"
    assert found["PCIe link"].verdict == "ok"
    assert found["torch on the GPU"].verdict == "ok"
    assert transfers == [cuda]
    assert used == [(cuda, torch.float16)]
    monkeypatch.setattr(device_checks, "total_device_memory", refuse)
    assert "could not be examined" in {check.name: check for check in examine()}["device"].found


def refuse(_: torch.device) -> int:
    raise RuntimeError("CUDA error: out of memory")
