"""The names that the package exports: each is one object, whatever was imported before."""

import subprocess
import sys

import offload_moe
from offload_moe.convert.quantize import quantize
from offload_moe.engine.load import load
from offload_moe.engine.model import Model
from offload_moe.engine.options import LoadOptions
from offload_moe.errors import OffloadMoeError

# Run apart: what was imported before decides whether a submodule may take a name's place.
IMPORT_EVERYTHING = """
import importlib, pkgutil
import offload_moe
before = {name: getattr(offload_moe, name) for name in offload_moe.__all__}
for module in pkgutil.walk_packages(offload_moe.__path__, "offload_moe."):
    if "_native" in module.name:
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name != "ray":  # an extra
            raise
after = {name: getattr(offload_moe, name) for name in offload_moe.__all__}
assert all(before[name] is after[name] for name in before), (before, after)
inside = {module.name for module in pkgutil.iter_modules(offload_moe.__path__)}
assert not inside & set(offload_moe.__all__), inside
from offload_moe import quantize
assert callable(quantize)
"""


def test_exported_names_are_pinned() -> None:
    assert sorted(offload_moe.__all__) == [
        "LoadOptions",
        "Model",
        "OffloadMoeError",
        "__version__",
        "load",
        "quantize",
    ]


def test_every_name_is_the_object_that_it_names() -> None:
    names = [name for name in offload_moe.__all__ if name != "__version__"]
    found = [getattr(offload_moe, name) for name in names for _ in range(2)]
    assert found[::2] == found[1::2] == [LoadOptions, Model, OffloadMoeError, load, quantize]


def test_no_submodule_takes_the_place_of_a_name() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERYTHING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
