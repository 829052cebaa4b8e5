"""FakeTensorMode on `cuda` with a CPU build of torch: a device guard compiled on the spot.

It guards nothing, and notes what is asked of streams and events.
"""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
#include <string>

using namespace c10;

static std::string log_of_calls;
static int64_t num_streams = 0;
static intptr_t num_events = 0;

static std::string number(void* event) { return std::to_string(reinterpret_cast<intptr_t>(event)); }
static std::string number(const Stream& stream) { return std::to_string(stream.id()); }
static void log(const std::string& line) { log_of_calls += line + "\\n"; }

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const noexcept override { return Stream(Stream::UNSAFE, device, 0); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  Stream getNewStream(Device, int) const override { return Stream(Stream::UNSAFE, getDevice(), ++num_streams); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream& stream, const DeviceIndex, const EventFlag) const override {
    if (!*event) *event = reinterpret_cast<void*>(++num_events);
    log("record event " + number(*event) + " on stream " + number(stream));
  }
  void block(void* event, const Stream& stream) const override {
    log("stream " + number(stream) + " waits for event " + number(event));
  }
  void synchronizeEvent(void* event) const override { log("the host waits for event " + number(event)); }
  bool queryEvent(void*) const override { return true; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

extern "C" const char* take_log() {
  static std::string taken;
  taken = log_of_calls;
  log_of_calls.clear();
  return taken.c_str();
}
"""

_libraries: list[ctypes.CDLL] = []


@cache
def cuda_guard_missing() -> str | None:
    """Register the guard once per process. Returns why that cannot be done, or None."""
    if torch.backends.cuda.is_built():
        return None
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler to build a CUDA device guard with"
    root = Path(torch.__file__).parent
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(SOURCE)
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        done = subprocess.run([compiler, str(source), *flags, "-o", str(library)], capture_output=True, text=True)
        if done.returncode:
            return f"the CUDA device guard does not compile: {done.stderr.strip().splitlines()[0]}"
        _libraries.append(ctypes.CDLL(str(library)))
    return None


def guard_calls() -> list[str]:
    """What was asked of the guard's streams and events since the last question."""
    take_log = _libraries[0].take_log
    take_log.restype = ctypes.c_char_p
    return take_log().decode().splitlines()
