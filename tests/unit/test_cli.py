"""The command line: quick help, exact exit codes, one-line errors, streams kept apart."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offload_moe.errors import BudgetError, CheckpointError, ConfigError
from tests.support.cli import ROOT, command, environment, fake_load_module, load_cli, run_cli

main = load_cli()


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_answer_at_once(tmp_path: Path, flag: str) -> None:
    """In seconds of the processor, as others may be using it too."""
    times = []
    for _ in range(5):
        begin = children_s()
        result = run_cli(tmp_path, flag)
        times.append(children_s() - begin)
        assert result.returncode == 0
        assert "offload-moe" in result.stdout
    assert min(times) < 0.3


def children_s() -> float:
    """Processor seconds of all processes that were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def run_python(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(cache), capture_output=True, text=True
    )


def test_the_end_is_not_spent_on_garbage(tmp_path: Path) -> None:
    code = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 1000));"
        "from tests.support.cli import load_cli; load_cli().main(['--version'])"
    )
    result = run_python(code, tmp_path)
    assert result.stdout.split()[-1] == "True", result.stderr


HEAVY = (
    *("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "huggingface_hub", "tokenizers"),
    "importlib.metadata",  # looks at every installed package
    *("numpy", "gguf", "psutil", "rich", "markdown_it", "prompt_toolkit", "starlette", "uvicorn", "ctypes"),
)


@pytest.mark.parametrize(
    "use",
    [
        "import offload_moe",
        "from offload_moe import OffloadMoeError, __version__",
        "from tests.support.cli import load_cli; load_cli().build_parser().format_help()",
        "from tests.support.cli import load_cli; load_cli().main(['--complete', 'chat', '--po'])",
        "from tests.support.cli import load_cli; load_cli().main(['config'])",
        "from tests.support.cli import load_cli; load_cli().build_parser().parse_args("
        "['run', 'demo', 'x', '--policy', 'lru', '--codec', 'nf4'])",
    ],
)
def test_what_is_quick_imports_nothing_heavy(tmp_path: Path, use: str) -> None:
    result = run_python(f"import sys; {use}; print(sorted({set(HEAVY)} & sys.modules.keys()))", tmp_path)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_the_package_is_imported_in_no_time(tmp_path: Path) -> None:
    """The goal is 0.15 s; the best of three, as others may be using the processor."""
    code = "import time; begin = time.process_time(); import offload_moe; print(time.process_time() - begin)"
    assert min(float(run_python(code, tmp_path).stdout) for _ in range(3)) < 0.15


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    from offload_moe_cli.commands import COMMANDS

    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main.main([name, "--help"])
        assert f"offload-moe {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["run"],
        ["run", "demo", "--frobnicate"],
        ["run", "demo", "--raw", "x", "y"],
        ["run", "demo", "x", "--codec", "q9"],
        ["run", "demo", "x", "--top-k", "many"],
    ],
)
def test_what_is_not_understood_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(arguments)
    assert "usage: offload-moe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "meant"),
    [("lst", "list"), ("Chat", "chat"), ("quantise", "quantize"), ("help", "--help"), ("docter", "doctor")],
)
def test_a_wrong_command_is_answered_with_a_close_one(
    word: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main([word, "demo"])
    assert f"there is no command '{word}'. Did you mean {meant}? Choose one of: chat, " in capsys.readouterr().err


def test_a_command_like_no_other_is_answered_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["xyzzy"])
    error = capsys.readouterr().err
    assert "Did you mean" not in error
    assert all(f" {name}" in error for name in ("quantize", "doctor"))


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([]) == 0
    streams = capsys.readouterr()
    assert "usage: offload-moe" in streams.out
    assert "quantize" in streams.out
    assert streams.err == ""


def test_a_size_that_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["chat", "--vram", "3Q"]) == 1
    assert capsys.readouterr().err == "error: Cannot read '3Q' as a size. Write it like 10GiB, 3.5G or 512MiB.\n"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (BudgetError("5.1 GiB needed,\n3.9 GiB free."), 1, "error: 5.1 GiB needed, 3.9 GiB free.\n"),
        (CheckpointError("Tensor \x1b[2Jblk\x9b is cut short."), 1, "error: Tensor [2Jblk is cut short.\n"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 1, "error: No such file or directory: x.json\n"),
        (
            RuntimeError("odd\nsecond line"),
            1,
            "error: RuntimeError: odd. Run again with --debug for the traceback.\n",
        ),
        (AssertionError(), 1, "error: AssertionError. Run again with --debug for the traceback.\n"),
        (KeyboardInterrupt(), 130, "\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("offload_moe_cli.commands.run.loaded_model", fail)
    monkeypatch.setattr(main, "quiet_libraries", lambda: None)
    assert main.main(["run", "demo", "hi"]) == status
    assert capsys.readouterr() == ("", message)
    if status == 1:
        assert main.main(["run", "demo", "hi", "--debug"]) == 1
        assert "Traceback" in capsys.readouterr().err


def test_an_empty_prompt_is_refused_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "demo", "  "]) == 1
    assert "prompt is empty" in capsys.readouterr().err


def test_flags_become_arguments_only_where_given() -> None:
    from offload_moe_cli.options import load_arguments, sampling_arguments

    plain = main.build_parser().parse_args(["chat"])
    assert (plain.model, load_arguments(plain), sampling_arguments(plain)) == (None, {}, {})
    options = main.build_parser().parse_args(
        ["run", "m", "p", "--vram", "1GiB", "--policy", "lru", "--temperature", "0", "--top-k", "5"]
    )
    assert load_arguments(options) == {"vram": 2**30, "policy": "lru"}
    assert load_arguments(main.build_parser().parse_args(["chat", "m", "--exact"])) == {"exact": True}
    assert sampling_arguments(options) == {"temperature": 0.0, "top_k": 5}


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["m", "p", "--raw"], "p"),
        (["m", "--raw", "p"], "p"),
        (["--raw", "m", "--top-k", "5", "p"], "p"),
        (["m", "--raw", "-"], "-"),
        (["m", "--raw", "--", "-p"], "-p"),
        (["m", "--raw"], None),
    ],
)
def test_a_prompt_may_stand_after_flags(arguments: list[str], prompt: str | None) -> None:
    options = main.build_parser().parse_args(["run", *arguments])
    assert (options.model, options.prompt, options.raw) == ("m", prompt, True)


def test_quantize_passes_everything_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    module = type(sys)("offload_moe.convert.quantize")

    def quantize(source: str, store: str, **settings: Any) -> str:
        settings.pop("progress")("Writing experts", 1, 2)
        settings.pop("on_notice")("mind the gap")
        calls.append((source, store, settings))
        if source == "org/stopped":
            raise KeyboardInterrupt
        return store

    module.quantize = quantize
    monkeypatch.setitem(sys.modules, "offload_moe.convert.quantize", module)
    monkeypatch.setattr(main, "quiet_libraries", lambda: None)
    assert main.main(["quantize", "org/model", "out", "--codec", "int8", "--revision", "v1"]) == 0
    options = {
        "codec": "int8",
        "dense_codec": "bf16",
        "scales": "error",
        "imatrix": None,
        "calibrate": None,
        "adapter": None,
        "revision": "v1",
        "delete_source_shards": False,
    }
    options["follow_links"] = False
    assert calls == [("org/model", "out", options)]
    out, err = capsys.readouterr()
    assert out == ""
    assert "Writing experts ...\nmind the gap\n" in err
    assert "offload-moe chat out" in err
    assert main.main(["quantize", "org/stopped", "out"]) == 130
    assert "The same command resumes" in capsys.readouterr().err


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line in this process, over tiny models."""
    monkeypatch.setitem(sys.modules, "offload_moe.engine.load", fake_load_module())
    monkeypatch.setattr("offload_moe_cli.loading.check_model", lambda *_: None)
    monkeypatch.setattr(main, "quiet_libraries", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


@pytest.mark.usefixtures("tiny")
def test_only_the_answer_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "thinker", "what is 1+1"]) == 0
    out, err = capsys.readouterr()
    assert out == "It is 2 é🙂.\n"
    assert err.splitlines() == [
        "Loading libraries ...",
        "Loading thinker ...",
        "Reading experts ...",
        "RAM 4.0 GiB of 16.0 GiB",
    ]


@pytest.mark.usefixtures("tiny")
def test_raw_continues_a_prompt_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon\n"))
    assert main.main(["run", "thinker", "-", "--raw", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == "<think>\n"


@pytest.mark.usefixtures("tiny")
@pytest.mark.filterwarnings("ignore:This model has no chat template")
def test_a_model_without_a_template_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run", "no-template", "x"], ["chat", "no-template"]):
        assert main.main(arguments) == 0
        assert "no chat template" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_a_setting_out_of_range_is_found_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "tiny", "x", "--top-p", "7"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: top_p is 7.0.")
    assert "Reading experts" not in err


@pytest.mark.usefixtures("tiny")
def test_an_error_ends_a_piped_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/frobnicate\nhello\n"))
    assert main.main(["chat", "loud"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-2:] == ["closed", err.splitlines()[-1]]
    assert err.splitlines()[-1].startswith("error: There is no command /frobnicate.")


@pytest.mark.usefixtures("tiny")
def test_a_store_that_does_not_load_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["chat", "corrupt"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: Expert 3 of layer 1 does not match its checksum. Quantize the model again."


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    with subprocess.Popen(
        command("run", "endless", "x"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment(tmp_path),
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(9) == "ha ha ha "
        process.stdout.close()
        assert process.stderr.read().splitlines()[-1] == "RAM 4.0 GiB of 16.0 GiB"
        assert process.wait(30) == 141


def test_piped_chat_answers_line_by_line(tmp_path: Path) -> None:
    stdin = 'hello\n\n"""two\nlines"""\n/set seed 3\n//etc\nback\\\nslash'
    result = run_cli(tmp_path, "chat", "loud", stdin=stdin)
    assert (result.returncode, result.stdout) == (0, "Hello, friend.\n" * 4)
    assert "seed is 3." in result.stderr
    assert result.stderr.endswith("closed\n")
    assert "\x1b" not in result.stdout + result.stderr


def test_names_of_settings_match_the_library() -> None:
    from offload_moe_cli import options

    from offload_moe.chat.sampling import SamplingArguments
    from offload_moe.plan.machine import DTYPES
    from offload_moe.plan.placement import DENSE_CODECS
    from offload_moe.quant import CODECS
    from offload_moe.residency.policy import POLICY_NAMES
    from offload_moe.speculate.choice import CHOICES

    assert set(options.SETTINGS) == set(SamplingArguments.__annotations__)
    assert options.GUESSES == CHOICES
    assert options.POLICIES == POLICY_NAMES
    assert (set(options.CODECS), set(options.DENSE_CODECS)) == (set(CODECS), set(DENSE_CODECS))
    assert tuple(DTYPES) == options.DTYPES
    with pytest.raises(ConfigError, match="warmth"):
        from offload_moe.chat import Sampling

        Sampling.of({"warmth": 1})
