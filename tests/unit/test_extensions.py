"""Extensions: found by metadata, imported when used, named when broken, never in place of what is built in."""

import sys
from pathlib import Path

import numpy as np
import pytest

from offload_moe.doctor.extensions import check_extensions
from offload_moe.engine.options import LoadOptions
from offload_moe.errors import ConfigError
from offload_moe.profile.replay import replay
from offload_moe.profile.trace import Trace, save_trace
from offload_moe.residency.keys import ExpertKeys
from offload_moe.residency.policy import POLICY_NAMES, make_policy, policy_names
from offload_moe.residency.policy.lru import LRU
from offload_moe.system.extensions import installed
from tests.support.cli import load_cli
from tests.support.extensions import Site

main = load_cli()
KEYS = ExpertKeys([4])
EXAMPLES = (
    "policy least-weight",
    "model example_moe",
    "layer ExampleMoeDecoderLayer",
    "adapter ExampleMoeExperts",
    "codec int6",
)
POLICIES = "offload_moe.policies"
MOST_RECENT = """
from offload_moe.residency.policy.lru import LRU
made = []
class MostRecent(LRU):
    def __init__(self, keys, layers, num_slots):
        super().__init__()
        made.append((keys.total, layers, num_slots))
    def victim(self, leased):
        return next((key for key in reversed(self._resident) if not leased(key)), None)
"""


def policy_of(site: Site, body: str, name: str = "acme") -> str:
    """Install a policy that is LRU but for `body`."""
    module = f"module_of_{name}"
    text = "from offload_moe.residency.policy.lru import LRU\nclass Made(LRU):\n    def __init__(self, *_):\n        "
    site.write(f"{name}-moe", {POLICIES: {name: f"{module}:Made"}}, **{module: f"{text}super().__init__()\n{body}"})
    return name


class TestNames:
    def test_none_is_installed(self) -> None:
        assert policy_names() == POLICY_NAMES
        assert [check.found for check in check_extensions()] == ["none are installed"]

    def test_are_read_without_an_import(self, site: Site) -> None:
        site.write("b-moe", {POLICIES: {"zebra": "absent_b:x", "acme": "absent_b:y"}})
        site.write("a-moe", {"offload_moe.other": {"x": "absent_a:x"}, "console_scripts": {"y": "absent_a:y"}})
        assert policy_names() == (*POLICY_NAMES, "acme", "zebra")
        assert not {"absent_a", "absent_b"} & sys.modules.keys()

    def test_of_built_in_policies_cannot_be_replaced(self, site: Site) -> None:
        site.write("greedy-moe", {POLICIES: {"lru": "greedy:MostRecent"}}, greedy=MOST_RECENT)
        assert policy_names() == POLICY_NAMES
        assert type(make_policy("lru", KEYS, num_slots=2)) is LRU
        (check,) = check_extensions()
        assert (check.verdict, "greedy-moe 1.0" in check.found) == ("warning", True)
        assert "built in" in check.fix

    def test_that_two_packages_register_are_refused(self, site: Site) -> None:
        for name in ("one", "two"):
            site.write(f"{name}-moe", {POLICIES: {"recent": f"{name}:MostRecent"}}, **{name: MOST_RECENT})
        assert policy_names() == (*POLICY_NAMES, "recent")
        with pytest.raises(ConfigError, match=r"registered by (one-moe 1.0 and two|two-moe 1.0 and one)-moe 1.0"):
            LoadOptions(policy="recent")
        assert [check.verdict for check in check_extensions()] == ["problem", "problem"]

    def test_of_a_distribution_that_is_twice_on_the_path_count_once(self, site: Site, tmp_path: Path) -> None:
        policy_of(site, "")
        again = tmp_path / "again"
        again.symlink_to(site.folder)
        sys.path.append(str(again))  # undone with the fixture's own change
        installed.cache_clear()
        assert [extension.name for extension in installed().extensions] == ["acme"]

    def test_of_unreadable_packages_are_reported_and_others_work(self, site: Site) -> None:
        site.write("torn-moe", f"[{POLICIES}]\nno equals sign\n")
        policy_of(site, "")
        assert LoadOptions(policy="acme").policy == "acme"
        found = {check.found: check.verdict for check in check_extensions()}
        assert sorted(found.values()) == ["ok", "warning"]
        assert any("unreadable entry points of torn-moe" in text for text in found)


class TestBroken:
    @pytest.mark.parametrize(
        ("target", "text", "reason"),
        [
            ("broken:Policy", "import nonesuch_module", "ModuleNotFoundError"),
            ("broken:Policy", "def", "SyntaxError"),
            ("broken:Policy", "raise SystemExit(3)", "SystemExit: 3"),
            ("broken:Policy", "from offload_moe.errors import StoreError\nraise StoreError('no store')", "no store"),
            ("broken:Policy", "", "AttributeError"),
            ("broken:Policy", "Policy = 3", "is int, which cannot be called"),
            ("broken Policy", "", "cannot be imported"),
        ],
    )
    def test_at_import(self, site: Site, target: str, text: str, reason: str) -> None:
        site.write("broken-moe", {POLICIES: {"acme": target}}, broken=text)
        with pytest.raises(ConfigError, match=r"The policy 'acme' of broken-moe 1\.0 ") as caught:
            LoadOptions(policy="acme")
        assert reason in str(caught.value)
        assert (caught.value.__cause__ is None) == ("called" in reason)
        (check,) = check_extensions()
        assert (check.verdict, check.fix) == ("problem", str(caught.value))

    def test_when_made(self, site: Site) -> None:
        policy_of(site, "        1 / 0")
        with pytest.raises(ConfigError, match=r"acme-moe 1\.0 failed: ZeroDivisionError"):
            make_policy("acme", KEYS, num_slots=2)

    def test_without_a_method(self, site: Site) -> None:
        site.write("acme-moe", {POLICIES: {"acme": "acme:Made"}}, acme="def Made(*_): return 3")
        with pytest.raises(ConfigError, match=r"acme-moe 1\.0 has no method access"):
            make_policy("acme", KEYS, num_slots=2)

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ("    def victim(self, leased): return 3", "evicts 3, which is not resident"),
            ("    def victim(self, leased): return []", "unhashable"),
            ("    def victim(self, leased): return next(iter(self._resident))", "evicts 0, which is leased"),
            ("    def victim(self, leased): return None", "evicts none, although"),
            ("    def access(self, layer, keys, *_): raise LookupError(keys)", r"LookupError: \[1\]"),
            ("    def insert(self, key): return 1 / (1 - key)", "ZeroDivisionError"),
            ("    def resize(self): pass", "TypeError"),
        ],
    )
    def test_in_use(self, site: Site, body: str, reason: str) -> None:
        policy = make_policy(policy_of(site, body), KEYS, num_slots=2)
        with pytest.raises(ConfigError, match=rf"The policy 'acme' of acme-moe 1\.0 .*{reason}"):
            policy.insert(0)
            policy.access(0, [1])
            policy.insert(1)
            policy.resize(3)
            policy.victim(lambda key: key == 0)

    def test_victims_that_become_leased_meanwhile_are_no_fault(self, site: Site) -> None:
        policy = make_policy(policy_of(site, ""), KEYS, num_slots=2)
        policy.insert(0)
        answers = iter([False, True])
        assert policy.victim(lambda key: next(answers)) == 0


class TestPolicy:
    TRACE = Trace(experts=np.array([[[0]], [[1]], [[2]], [[0]], [[1]]]), num_experts=4, sequence_lengths=np.array([5]))

    def test_is_replayed_as_it_decides(self, site: Site) -> None:
        site.write("recent-moe", {POLICIES: {"recent": "recent:MostRecent"}}, recent=MOST_RECENT)
        assert replay(self.TRACE, "lru", num_slots=2).num_hits == 0
        assert replay(self.TRACE, "recent", num_slots=2).num_hits == 1  # 1 made room for 2, and 0 stayed
        assert sys.modules["recent"].made == [(4, range(1), 2)]

    @pytest.mark.usefixtures("example")
    def test_is_a_choice_of_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_trace(self.TRACE, tmp_path / "trace.npz")
        for name in ("all", "least-weight"):
            assert main.main(["profile", "--replay", str(tmp_path / "trace.npz"), "--policy", name]) == 0
            assert "least-weight" in capsys.readouterr().out
        assert main.main(["run", "demo", "x", "--policy", "least-wait"]) == 1
        assert "Did you mean least-weight?" in capsys.readouterr().err
        assert main.main(["--complete", "chat", "--policy", "l"]) == 0
        assert capsys.readouterr().out.split() == ["least-weight", "lfu", "lru", "lru-2"]

    def test_that_is_broken_is_one_line_and_a_traceback_for_debugging(
        self, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_trace(self.TRACE, tmp_path / "trace.npz")
        policy_of(site, "    def access(self, *_): raise RuntimeError('in the extension')")
        arguments = ["profile", "--replay", str(tmp_path / "trace.npz"), "--policy", "acme"]
        assert main.main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("error: The policy 'acme' of acme-moe 1.0 failed: RuntimeError: in the extension.")
        assert main.main([*arguments, "--debug"]) == 1
        assert "RuntimeError: in the extension\n" in capsys.readouterr().err


@pytest.mark.usefixtures("example")
def test_a_codec_is_a_choice_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("quantize", "plan", "simulate", "chat"):
        assert main.main(["--complete", command, "--codec", "i"]) == 0
        assert capsys.readouterr().out.split() == ["int6", "int8"]
    assert main.build_parser().parse_args(["plan", "demo", "--codec", "int6"]).codec == "int6"
    for arguments in (["plan", "demo", "--codec", "int5"], ["plan", "demo", "--dense-codec", "int6"]):
        with pytest.raises(SystemExit, match="2"):
            main.main(arguments)
        assert ("int6" in capsys.readouterr().err.partition("choose from")[2]) == ("int5" in arguments)


@pytest.mark.usefixtures("example")
def test_the_doctor_lists_the_example(site: Site) -> None:
    checks = check_extensions()
    assert {check.verdict for check in checks} == {"ok"}
    found = {check.found for check in checks}
    assert found == {f"{what} of moe-extension-example 1.0, in {site.folder}" for what in EXAMPLES}
