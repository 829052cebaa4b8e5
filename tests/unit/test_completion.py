"""Completion in a shell, out of the parsers."""

import contextlib
import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from offload_moe.system.names import STORES
from tests.support.cli import ROOT, environment, load_cli

main = load_cli()

SHELLS = ("bash", "zsh", "fish")


def candidates(*words: str) -> list[str]:
    from offload_moe_cli.completion import candidates

    found: list[str] = candidates(main.build_parser(), words)
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["p"], ["plan", "profile"]),
        (["--i"], ["--install-completion"]),
        (["plan", "--v"], ["--vram"]),
        (["plan", "x", "--dense-codec", "b"], ["bf16"]),
        (["chat", "--temperature", "0", "--policy", "lru"], ["lru", "lru-2"]),
        (["chat", "--hybrid", ""], ["auto", "off", "on"]),
        (["config", "c"], ["context"]),
        (["config", "--unset", "v"], ["vram"]),
        (["rm", ""], ["demo"]),
        (["rm", "--yes", "d"], ["demo"]),
        (["chat", "--codec=n"], ["--codec=nf4"]),
        (
            ["plan", "--dense-codec=int8", "--dense-codec="],
            ["--dense-codec=bf16", "--dense-codec=int8", "--dense-codec=nf4"],
        ),
        (["chat", "--codec", "=", "n"], ["nf4"]),
        (["chat", "--hybrid", "="], ["auto", "off", "on"]),
        (["chat", "--codec", "=", "nf4", "d"], ["demo"]),
        (["chat", "--temperature=0", "d"], ["demo"]),
        (["run", "demo", "d"], []),  # a prompt
        (["run", "--file", "d"], []),  # a file, which the shell completes
        (["run", "--plain", "de"], ["demo"]),
        (["nonesuch", ""], []),
        (["frobnic"], []),
    ],
)
def test_what_may_follow(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    assert candidates(*words) == expected


def test_one_word_is_a_line_and_none_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--complete", "config", "ram", "x"]) == 0
    assert capsys.readouterr().out == ""
    assert main.main(["--complete", "p"]) == 0
    assert capsys.readouterr().out == "plan\nprofile\n"


def test_every_command_and_flag_is_offered() -> None:
    from offload_moe_cli.commands import COMMANDS

    assert candidates("") == sorted(COMMANDS)
    assert {"--ram", "--help", "--debug", "--seed"} <= set(candidates("chat", "-"))


def test_installed_models_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_MOE_CACHE", str(tmp_path))
    for name in ("mixtral-nf4", "mine"):
        (tmp_path / STORES / name).mkdir(parents=True)
    assert candidates("chat", "m") == ["mine", "mixtral-nf4"]
    assert candidates("info", "") == ["demo", "mine", "mixtral-nf4"]
    assert candidates("run", "--ram", "1GiB", "mix") == ["mixtral-nf4"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_written_where_the_shell_finds_it(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "BASH_COMPLETION_USER_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    with pytest.raises(SystemExit, match="0"):
        main.main(["--install-completion"])
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert str(path) in capsys.readouterr().out
    assert "offload-moe --complete" in path.read_text()
    by_shell = {
        "bash": ".local/share/bash-completion/completions/offload-moe",
        "zsh": ".local/share/zsh/site-functions/_offload-moe",
        "fish": ".config/fish/completions/offload-moe.fish",
    }
    assert path == tmp_path / by_shell[shell]


def test_another_shell_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert main.main(["--install-completion"]) == 1
    assert "Name it: --install-completion bash|zsh|fish" in capsys.readouterr().err
    assert main.main(["--install-completion", "fihs"]) == 1
    assert "There is no shell 'fihs'. Did you mean fish?" in capsys.readouterr().err


def install_in_bash(folder: Path, first: str) -> tuple[Path, dict[str, str]]:
    """The script for bash, and an environment with a program for it, which begins with the line `first`."""
    from offload_moe_cli.completion import install

    script, _ = install("bash", {"XDG_DATA_HOME": str(folder)})
    (folder / STORES / "my model").mkdir(parents=True)
    program = folder / "bin" / "offload-moe"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n{first}\nexec {sys.executable} -m tests.support.cli "$@"\n')
    program.chmod(0o755)
    return script, environment(folder, PATH=f"{program.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [(["pl"], ["plan"]), (["chat", "my"], ["my model"]), (["chat", "--codec", "n"], ["nf4"])],
)
def test_bash_completes(words: list[str], expected: list[str], tmp_path: Path) -> None:
    script, variables = install_in_bash(tmp_path, ":")
    code = (
        f"source {script}; COMP_WORDS=(offload-moe {' '.join(words)}); COMP_CWORD={len(words)};"
        " $(complete -p offload-moe | grep -o '_[a-z_]*');"
        ' printf "%s\\n" "${COMPREPLY[@]}"'
    )
    run = subprocess.run(["bash", "--norc", "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines() == expected, run.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_program_gets_what_was_completed_at_the_prompt(tmp_path: Path) -> None:
    """Names with spaces, begun in each way of quoting, and a value behind `=`."""
    words = tmp_path / "words"
    script, variables = install_in_bash(tmp_path, f'[ "$1" = --complete ] || exec printf "%s\\n" "$@" >>{words}')
    typed = ("info my\t", "rm my\\ mo\t", 'chat "my mo\t', "chat --codec=n\t")
    lines = "".join(f"offload-moe {line}\n" for line in typed)
    shell, terminal = pty.openpty()
    with subprocess.Popen(
        ["bash", "--norc", "-i"], env=variables, cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal
    ) as bash:
        os.close(terminal)
        (limit := threading.Timer(120, bash.kill)).start()  # it waits for the end of a quotation that is left open
        os.write(shell, f"source {script}\n{lines}exit\n".encode())
        with contextlib.suppress(OSError):  # EIO once bash has left
            while os.read(shell, 4096):
                pass
        limit.cancel()
        assert bash.wait(30) == 0
    os.close(shell)
    expected = ["info", "my model", "rm", "my model", "chat", "my model", "chat", "--codec=nf4"]
    assert words.read_text().splitlines() == expected
