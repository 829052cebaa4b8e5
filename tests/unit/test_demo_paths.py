"""The cache folder follows each platform's convention."""

from pathlib import Path

import pytest

from offload_moe.system.paths import cache_dir

HOME = Path.home()


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({}, "linux", HOME / ".cache" / "offload_moe"),
        ({"XDG_CACHE_HOME": "/big/cache"}, "linux", Path("/big/cache/offload_moe")),
        ({"XDG_CACHE_HOME": "relative"}, "linux", HOME / ".cache" / "offload_moe"),
        ({"XDG_CACHE_HOME": "/big/cache"}, "darwin", HOME / "Library" / "Caches" / "offload_moe"),
        ({"LOCALAPPDATA": "/local"}, "win32", Path("/local/offload_moe/cache")),
        ({}, "win32", HOME / "AppData" / "Local" / "offload_moe" / "cache"),
        ({"OFFLOAD_MOE_CACHE": "/mine", "XDG_CACHE_HOME": "/big"}, "linux", Path("/mine")),
        ({"OFFLOAD_MOE_CACHE": "~/mine"}, "darwin", HOME / "mine"),
    ],
)
def test_cache_dir(environ: dict[str, str], platform: str, expected: Path) -> None:
    assert cache_dir(environ, platform) == expected
