"""What the wheel holds is what the tree holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_in_the_wheel() -> None:
    found = {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for folder, name in (("offload_moe", "offload_moe"), ("cli", "offload_moe_cli"))
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found


def test_every_data_file_is_in_the_wheel() -> None:
    for path in (ROOT / "offload_moe").rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so", ".c", ".h"):
            package = ".".join(path.parent.relative_to(ROOT).parts)
            patterns = SETUPTOOLS["package-data"].get(package, [])
            assert any(path.match(pattern) for pattern in patterns), f"{path.relative_to(ROOT)} is left out"
