"""Order of memory between blocks of a launch, and between card and host, which the shim cannot see: a rule on texts.

Blocks of a launch exchange nothing: what a kernel writes is read by later launches, or by the thread that wrote it. The
host reads mapped memory while a kernel runs only behind a flag, and every store before a flag is behind a fence.
"""

import re
from pathlib import Path

import pytest

from tests.support.cuda.card import SOURCES
from tests.support.cuda.fake import CSRC
from tests.support.cuda.shim import KERNELS


def texts_of(folder: Path) -> dict[str, str]:
    return {path.name: re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.DOTALL) for path in folder.glob("*.cuh")}


TEXTS = texts_of(KERNELS)
# Kernels that write where the host reads meanwhile, and the flag of each.
FLAGS = {"om_resolve": "p.notice->stamp", "om_finish": "p.notice->done"}
HOSTS = r"p\.(?:notice->\w+|host_normed)(?:\[[^\]]*\])? = "
FENCE, BARRIER = "__threadfence_system();", "__syncthreads();"
# Atomics, all of them on shared memory: by file, what they change.
ATOMICS = {"choose.cuh": {"m.bins"}, "residency.cuh": {"num_distinct", "num_missing", "has_no_source"}}
HOSTS_FLAGS = "stamp|done"
ONE_BLOCK = {"resolve", "admit", "finish"}  # launches of a single block, which barriers order
BY_TWO_KERNELS = {("choose", "greatest")}  # one launch writes it, and a later one reads it
PARAMS = re.compile(r"om_card_(\w+)_params\s*&?\s*p\b")
INDEX = r"\[(?:[^\[\]]|\[(?:[^\[\]]|\[[^\[\]]*\])*\])*\]"
MEMBER = re.compile(rf"\bp((?:\.|->)\w+(?:(?:\.|->)\w+)*)((?:{INDEX})*)(\s*[-+*/|]?=(?!=))?")


def body(text: str, kernel: str) -> str:
    """From its name to its end."""
    begin = text.index(f" {kernel}(const")
    return text[begin : text.index("\n}", begin)]


def faults_of_flags(text: str) -> list[str]:
    """Stores of kernels where the host reads that do not come before a fence and their flag."""
    found = []
    for kernel, flag in FLAGS.items():
        code = body(text, kernel)
        (at,) = (match.start() for match in re.finditer(re.escape(flag) + r" = ", code))
        fence = code.rfind(FENCE, 0, at)
        stores = [match.start() for match in re.finditer(HOSTS, code) if match.start() != at]
        if any(store > fence for store in stores):
            found.append(f"{kernel}: a store behind the last fence before {flag}")
        together = re.search(re.escape(FENCE) + r"\s*" + re.escape(BARRIER), code[:at])
        if together is None:
            found.append(f"{kernel}: no fence of all threads in front of the barrier before {flag}")
        else:
            alone = code.index("if (t == 0)", together.end())
            found += [f"{kernel}: a store of all threads behind it" for s in stores if together.start() < s < alone]
    others = {name for name in re.findall(r"(\bom_\w+)\(const om_card", text) if name not in FLAGS}
    return found + [f"{name} writes where the host reads" for name in others if re.search(HOSTS, body(text, name))]


def unordered_reads(text: str) -> list[str]:
    """Lines of the host's code that read a flag while a kernel may run, and do not order later reads behind it."""
    others = re.sub(
        rf"__atomic_load_n\(&[\w>-]+->(?:{HOSTS_FLAGS}), __ATOMIC_ACQUIRE\)|om_host_access\(.*\);", "", text
    )
    return re.findall(rf"^.*->(?:{HOSTS_FLAGS})\b(?! = ).*$", others, re.MULTILINE)


def both_read_and_written(text: str) -> set[tuple[str, str]]:
    """Members of parameters that kernels of several blocks read and write: kind of parameters and member."""
    kinds = [(match.start(), match[1]) for match in PARAMS.finditer(text)]
    read, written = set(), set()
    for match in MEMBER.finditer(text):
        kind = [name for start, name in kinds if start <= match.start()][-1:]
        if kind and kind[0] not in ONE_BLOCK and match[2]:
            (written if match[3] else read).add((kind[0], match[1].lstrip(".->")))
    return (read & written) - BY_TWO_KERNELS


def test_flags_come_behind_fences() -> None:
    assert faults_of_flags(texts_of(SOURCES)["residency.cuh"]) == []


@pytest.mark.parametrize("number", range(3))
def test_a_fence_that_is_missing_is_noticed(number: int) -> None:
    text = TEXTS["residency.cuh"]
    at = [match.start() for match in re.finditer(re.escape(FENCE), text)]
    assert len(at) == 3
    assert faults_of_flags(text[: at[number]] + text[at[number] + len(FENCE) :])


def test_the_host_reads_flags_in_order() -> None:
    texts = {path.name: path.read_text() for path in CSRC.glob("card_*.c")}
    assert {name: lines for name, text in texts.items() if (lines := unordered_reads(text))} == {}
    plain = texts["card_step.c"].replace(", __ATOMIC_ACQUIRE", ", __ATOMIC_RELAXED")
    assert len(unordered_reads(plain)) == 1


def test_a_store_behind_a_fence_or_of_another_kernel_is_noticed() -> None:
    text = TEXTS["residency.cuh"]
    places = "p.notice->stamp = now;", "p.notice->done = token;", "if (row >= *p.pass.num_rows || p.hits[i]) return;"
    for before in places:
        assert text.count(before) == 1
        assert faults_of_flags(text.replace(before, f"p.notice->layer = 7;\n{before}"))


def test_blocks_of_a_launch_exchange_nothing() -> None:
    texts = texts_of(SOURCES)
    assert {name: found for name, text in texts.items() if (found := both_read_and_written(text))} == {}
    fences = {name: text.count("__threadfence") for name, text in texts.items()}
    assert {name: count for name, count in fences.items() if count} == {"residency.cuh": 3}
    atomics = {name: set(re.findall(r"atomic\w+\(&?([\w.]+)", text)) for name, text in texts.items()}
    assert {name: found for name, found in atomics.items() if found} == ATOMICS


def test_an_exchange_is_noticed() -> None:
    text = TEXTS["choose.cuh"].replace("p.tokens[row] = token;", "p.tokens[row] = token, token = p.tokens[row + 1];")
    assert both_read_and_written(text) == {("choose", "tokens")}
    text = TEXTS["embed.cuh"].replace("p.tokens[row];", "p.tokens[row] + (int)p.x[row * HIDDEN];")
    assert both_read_and_written(text) == {("embed", "x")}
