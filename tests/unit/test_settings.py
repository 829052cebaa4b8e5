"""`offload-moe config`: a user's defaults from the environment and a file, and where they count."""

import argparse
import json
import os
from pathlib import Path

import pytest

from offload_moe.doctor.settings import check_settings
from offload_moe.errors import ConfigError
from offload_moe.system.paths import config_file
from offload_moe.system.settings import SETTINGS, read_settings, write_setting
from tests.support.cli import load_cli

main = load_cli()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of settings, which does not exist yet."""
    path = tmp_path / "folder" / "config.toml"
    monkeypatch.setenv("OFFLOAD_MOE_CONFIG", str(path))
    for name in SETTINGS:
        monkeypatch.delenv(f"OFFLOAD_MOE_{name.upper()}", raising=False)
    return path


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def parsed(*arguments: str) -> dict[str, object]:
    """The settings of a command after its defaults were filled in."""
    from offload_moe_cli.options import MEMORY, fill

    options = main.build_parser().parse_args(arguments)
    fill(options, *(name for name in ("model", "port", *MEMORY) if hasattr(options, name)))
    return {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}


def test_without_a_file_everything_has_its_default(file: Path) -> None:
    assert parsed("serve") == {"model": "demo", "vram": None, "ram": None, "context": None, "port": 8000}
    assert {found.origin for found in read_settings().values()} == {"default"}


def test_a_flag_wins_over_the_environment_and_that_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(file, 'model = "from-file"\nram = "3GiB"\ncontext = 512\nport = 9000\n')
    assert parsed("serve") == {"model": "from-file", "vram": None, "ram": 3 << 30, "context": 512, "port": 9000}
    monkeypatch.setenv("OFFLOAD_MOE_RAM", "4GiB")
    monkeypatch.setenv("OFFLOAD_MOE_MODEL", "")  # as if it were not set
    monkeypatch.setenv("OFFLOAD_MOE_PORT", "9001")
    flags = ("--context", "64", "--port", "0")
    assert parsed("serve") == {"model": "from-file", "vram": None, "ram": 4 << 30, "context": 512, "port": 9001}
    assert parsed("serve", "given", *flags, "--ram", "0") == {
        "model": "given",
        "vram": None,
        "ram": 0,
        "context": 64,
        "port": 0,
    }
    assert read_settings()["ram"].origin == "OFFLOAD_MOE_RAM"
    assert read_settings()["port"].text == "9001"


def test_loading_and_planning_use_the_defaults(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share one planner, so both count the same memory; another card's plan does not have this one's VRAM."""
    written(file, 'ram = "5GiB"\nvram = "1GiB"\ncontext = 128\n')
    seen: list[dict[str, object]] = []

    def plan(source: object, machine: dict[str, object], *, context: int, **_: object) -> None:
        seen.append(machine | {"context": context})
        raise ConfigError("seen")

    def load(options: argparse.Namespace) -> None:
        seen.append({name: getattr(options, name) for name in ("vram", "ram", "context")})
        raise ConfigError("seen")

    monkeypatch.setattr("offload_moe.plan.measure_machine", dict)
    monkeypatch.setattr("offload_moe.plan.with_card", lambda machine, _, *, vram: machine | {"vram": vram})
    monkeypatch.setattr("offload_moe.plan.make_plan", plan)
    monkeypatch.setattr("offload_moe_cli.loading.load_arguments", load)
    for command in (["plan", "demo"], ["plan", "demo", "--gpu", "rtx-4090"], ["run", "demo", "Hi."]):
        assert main.main(command) == 1
    whole = {"vram": 1 << 30, "ram": 5 << 30, "context": 128}
    assert seen == [whole, whole | {"vram": None}, whole]


def test_setting_keeps_every_other_line(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(file, '# my machine\nram = "3GiB"  # half\n\ncontext = 512')
    assert main.main(["config", "ram", "8GiB"]) == 0
    assert main.main(["config", "port", "9000"]) == 0
    assert main.main(["config", "model", 'größe/"x"']) == 0
    expected = '# my machine\nram = "8GiB"\n\ncontext = 512\nport = 9000\nmodel = "größe/\\"x\\""\n'
    assert file.read_text(encoding="utf-8") == expected
    assert main.main(["config", "context", "--unset"]) == 0
    assert main.main(["config", "vram", "--unset"]) == 0
    assert file.read_text(encoding="utf-8") == expected.replace("context = 512\n", "")
    capsys.readouterr()
    assert main.main(["config", "model"]) == 0
    assert capsys.readouterr().out == 'größe/"x"\n'
    assert main.main(["config", "context"]) == 1
    assert capsys.readouterr().out == ""
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o640])
def test_setting_keeps_the_mode_of_the_file(file: Path, mode: int) -> None:
    written(file, 'ram = "3GiB"\n').chmod(mode)
    write_setting("ram", "4GiB")
    assert file.read_text() == 'ram = "4GiB"\n'
    assert file.stat().st_mode & 0o777 == mode


def test_setting_keeps_the_ends_of_lines(file: Path) -> None:
    written(file, "").write_bytes(b'# mine\r\nram = "3GiB"\r\nport = 9000')
    write_setting("ram", "4GiB")
    write_setting("context", "512")
    write_setting("port", None)
    assert file.read_bytes() == b'# mine\r\nram = "4GiB"\r\ncontext = 512\r\n'


def test_nothing_to_remove_writes_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "ram", "--unset"]) == 0
    assert not file.parent.exists()
    before = written(file, "port = 9000\n").stat().st_ino
    assert main.main(["config", "ram", "--unset"]) == 0
    assert file.stat().st_ino == before
    assert capsys.readouterr().err == "ram is not in the file of settings.\n" * 2


def test_a_path_is_kept_whole_and_a_link_stays_one(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = written(tmp_path / "dotfiles" / "settings", "")
    file.parent.mkdir()
    file.symlink_to(target)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert write_setting("model", "a.gguf") == file
    assert file.is_symlink()
    assert target.read_text() == f'model = "{tmp_path / "a.gguf"}"\n'


def test_all_settings_are_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(file, 'ram = "3GiB"\n')
    assert main.main(["config"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["model", "demo", "default"],
        ["vram", "-", "default"],
        ["ram", "3GiB", str(file)],
        ["context", "-", "default"],
        ["port", "8000", "default"],
    ]
    assert main.main(["config", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["file"] == str(file)
    assert document["settings"]["ram"] == {"value": 3 << 30, "origin": str(file)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ram = 8GiB", r"config\.toml is not TOML: .*line 1"),
        ('ram = "8"', r"ram in .*config\.toml is not usable: '8' has no unit\. Did you mean 8GiB"),
        ("ram = 8", r"ram in .*config\.toml is not usable: '8' has no unit"),
        ("ram = true", r'ram is neither text nor a whole number\. Write it like: ram = "32GiB"'),
        ("context = 0.5", r"context is neither text nor a whole number\. Write it like: context = 8192"),
        ("context = 0", r"context in .* is not usable: A context of '0' tokens"),
        ("port = 70000", r"port in .* is not usable: Port 70000"),
        ('vrma = "1GiB"', r"There is no setting 'vrma'\. Did you mean vram\?"),
        ('[memory]\nram = "1GiB"', "There is no setting 'memory'"),
        ('model = " "', "name of a model is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    file: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written(file, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_settings()
    assert str(file) in str(caught.value)
    assert main.main(["chat", "nonesuch/model"]) == 1
    assert str(file) in capsys.readouterr().err
    check = check_settings()
    assert check.verdict == "problem"
    assert check.fix == str(caught.value)


def test_commands_that_need_no_defaults_do_not_read_them(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(file, "ram = 8GiB")
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path / "cache"))
    assert main.main(["list"]) == 0


def test_a_variable_that_cannot_be_used_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CONTEXT", "many")
    with pytest.raises(ConfigError, match=r"^OFFLOAD_MOE_CONTEXT is not usable: A context of 'many'"):
        read_settings()


def test_a_file_in_another_encoding_or_place_is_an_error(file: Path) -> None:
    written(file, "").write_bytes('model = "größe"'.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not TOML: 'utf-8' codec"):
        read_settings()
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_settings()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ram", "8", "has no unit"),
        ("colour", "red", "no setting 'colour'"),
        ("port", "x", "Port x is not usable"),
    ],
)
def test_a_value_that_cannot_be_used_is_not_written(file: Path, name: str, value: str, message: str) -> None:
    before = written(file, 'ram = "3GiB"\n').read_bytes()
    with pytest.raises(ConfigError, match=message):
        write_setting(name, value)
    assert file.read_bytes() == before


def test_a_device_is_not_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that run as root can replace /dev/null."""
    monkeypatch.setenv("OFFLOAD_MOE_CONFIG", os.devnull)
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("replaced"))
    with pytest.raises(ConfigError, match="is no file, so no default can be kept there"):
        write_setting("ram", "3GiB")


@pytest.mark.parametrize("text", ["ram = 8GiB\n", '"ram" = "3GiB"\n'])
def test_what_cannot_be_changed_is_left_alone(file: Path, text: str) -> None:
    written(file, text)
    with pytest.raises(ConfigError):
        write_setting("ram", "4GiB")
    assert file.read_text() == text
    assert [path.name for path in file.parent.iterdir()] == ["config.toml"]


def test_doctor_shows_the_defaults(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_settings().found == "no defaults are set"
    written(file, 'ram = "3GiB"\n')
    monkeypatch.setenv("OFFLOAD_MOE_PORT", "9000")
    assert check_settings().found == f"ram 3GiB ({file}), port 9000 (OFFLOAD_MOE_PORT)"


@pytest.mark.parametrize(
    ("platform", "environ", "expected"),
    [
        ("linux", {"XDG_CONFIG_HOME": "/etc/me"}, "/etc/me/offload_moe/config.toml"),
        ("linux", {"XDG_CONFIG_HOME": "relative"}, "~/.config/offload_moe/config.toml"),
        ("darwin", {"XDG_CONFIG_HOME": "/etc/me"}, "~/Library/Application Support/offload_moe/config.toml"),
        ("win32", {"APPDATA": "/roaming"}, "/roaming/offload_moe/config.toml"),
        ("linux", {"OFFLOAD_MOE_CONFIG": "~/x.toml"}, "~/x.toml"),
    ],
)
def test_where_the_file_is(platform: str, environ: dict[str, str], expected: str) -> None:
    assert config_file(environ, platform) == Path(expected).expanduser()
