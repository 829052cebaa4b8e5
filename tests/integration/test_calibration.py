"""`quantize --calibrate`: less error on the inputs of each matrix in the same bytes, stopped and resumed at will."""

import contextlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload_moe import load
from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.convert import calibration_text
from offload_moe.convert.calibration import Calibration
from offload_moe.convert.calibration_text import BUILT_IN, read_calibration_text
from offload_moe.convert.inputs_folder import InputsFolder
from offload_moe.convert.layerwise import ids_name, record_inputs
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError, ConfigError, OffloadMoeError, StoreError
from offload_moe.quant import get_codec
from offload_moe.store import Store, is_store
from tests.integration.test_layerwise import Log
from tests.support.chat import byte_tokenizer, chat_model
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_models import write_model

LINEAR = "model.layers.1.self_attn.o_proj"
HELD_OUT = Path(__file__).parents[2] / "benchmarks" / "heldout.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, whose widths are several blocks, and a text beside it."""
    folder = tmp_path_factory.mktemp("calibration") / "model"
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    made = chat_model("qwen3_moe", **sizes)
    for name, weight in made.named_parameters():
        if name.endswith("post_attention_layernorm.weight"):  # some inputs of experts are larger than others
            weight.data *= torch.rand(128, generator=torch.Generator().manual_seed(0)).mul(3).exp()
    made.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder.parent / "text.txt").write_text(BUILT_IN.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    return model.parent / "text.txt"


@pytest.fixture(scope="module")
def stores(model: Path, text: Path) -> dict[str, Store]:
    """The same model with and without."""
    folder = model.parent
    plain = quantize(model, folder / "plain", codec="nf4", dense_codec="nf4")
    calibrated = quantize(model, folder / "calibrated", codec="nf4", dense_codec="nf4", calibrate=text)
    return {"plain": Store.open(plain), "calibrated": Store.open(calibrated)}


@pytest.fixture(scope="module")
def inputs(model: Path, text: Path) -> dict[str, Tensor]:
    log = Log()
    with Checkpoint(model) as checkpoint:
        record_inputs(checkpoint, read_calibration_text(text, model).ids, (LINEAR,), log)
    return log.inputs


def error_of(decoded: Tensor, weight: Tensor, rows: Tensor) -> float:
    """Of the products with these inputs, relative."""
    return float((rows @ (decoded - weight).T).norm() / (rows @ weight.T).norm())


def expert_errors(model: Path, store: Store, inputs: dict[str, Tensor]) -> dict[str, list[float]]:
    """Matrix -> the errors of layer 1's experts, each on its own inputs."""
    errors: dict[str, list[float]] = {"gate_up_proj": [], "down_proj": []}
    with Checkpoint(model) as checkpoint:
        layer = checkpoint.layers[1]
        rows, ids = inputs[layer.name].float(), inputs[ids_name(layer.name)]
        for expert in range(layer.num_experts):
            own = rows[(ids == expert).any(1)]
            if len(own) <= 100:
                continue
            tensors = {name: value.float() for name, value in checkpoint.expert(1, expert).items()}
            record = store.read_expert(1, expert)
            decoded = get_codec(store.codec).decode(layer.shape, record, torch.float32)
            gate, up = (own @ tensors["gate_up_proj"].T).chunk(2, dim=-1)
            of_last = torch.nn.functional.silu(gate) * up
            for name, given in (("gate_up_proj", own), ("down_proj", of_last)):
                errors[name].append(error_of(decoded[name], tensors[name], given))
    return errors


@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
def test_experts_have_less_error_on_their_inputs(
    model: Path, stores: dict[str, Store], inputs: dict[str, Tensor], matrix: str
) -> None:
    plain, calibrated = (expert_errors(model, stores[name], inputs)[matrix] for name in ("plain", "calibrated"))
    assert len(plain) > 3
    for before, after in zip(plain, calibrated, strict=True):
        assert 0 < after < 0.75 * before


def test_linears_have_less_error_on_their_inputs(
    model: Path, stores: dict[str, Store], inputs: dict[str, Tensor]
) -> None:
    with Checkpoint(model) as checkpoint:
        weight = checkpoint.dense_tensor(f"{LINEAR}.weight").float()
    errors = {}
    for name, store in stores.items():
        shape = store.dense[f"{LINEAR}.weight"].quantized
        assert shape is not None
        record = store.read_dense(f"{LINEAR}.weight")
        decoded = get_codec("nf4").decode(shape, record, torch.float32)["weight"]
        errors[name] = error_of(decoded, weight, inputs[LINEAR].float())
    assert 0 < errors["calibrated"] < 0.9 * errors["plain"]


def test_the_store_says_what_it_was_calibrated_on(stores: dict[str, Store], model: Path) -> None:
    assert stores["plain"].importances is None
    assert "importances" not in json.loads((stores["plain"].path / "store.json").read_text())
    importances = stores["calibrated"].importances
    assert importances is not None
    assert (importances.kind, importances.name, len(importances.sha256)) == ("text", "text.txt", 64)
    assert sorted(path.name for path in model.parent.iterdir()) == ["calibrated", "model", "plain", "text.txt"]


def test_a_calibrated_store_answers(stores: dict[str, Store]) -> None:
    assert stores["plain"].layers == stores["calibrated"].layers
    with load(stores["calibrated"].path) as model:
        assert model.generate("Hello", max_new_tokens=4, temperature=0)


def test_int8_has_less_error_too(model: Path, text: Path, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    plain, calibrated = (
        Store.open(quantize(model, tmp_path / name, codec="int8", calibrate=chosen))
        for name, chosen in (("plain", None), ("calibrated", text))
    )
    assert plain.layers == calibrated.layers
    before, after = (expert_errors(model, store, inputs) for store in (plain, calibrated))
    for matrix in before:
        assert 0 < sum(after[matrix]) < 0.97 * sum(before[matrix])


@pytest.mark.slow
def test_a_gguf_file_is_calibrated_where_it_is_quantized_anew(text: Path, tmp_path: Path) -> None:
    made = write_model(tmp_path / "model", "mixtral", "Q8_0")
    with pytest.raises(ConfigError, match="experts are kept in gguf"):
        quantize(made.path, tmp_path / "store", calibrate=text)
    store = Store.open(quantize(made.path, tmp_path / "store", codec="nf4", calibrate=text))
    assert store.importances is not None
    plain = Store.open(quantize(made.path, tmp_path / "plain", codec="nf4"))
    assert not torch.equal(store.read_expert(1, 2), plain.read_expert(1, 2))


class Kept(InputsFolder):
    """Given inputs, of which expert 0 has those of the given tokens, and experts 1 and 2 the others."""

    def __init__(self, rows: Tensor, of_first: Tensor) -> None:
        self._rows = rows
        self._ids = torch.where(of_first, 0, 1)[:, None].int() * torch.tensor([[1, 2]], dtype=torch.int32)

    def has(self, name: str) -> bool:
        return True

    def read(self, name: str) -> Tensor:
        return self._ids if name.endswith(".ids") else self._rows


def moments_of(model: Path, text: Path, kept: Kept, experts: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """The moments of these experts, each with the weights of expert 3."""
    with Checkpoint(model) as checkpoint:
        calibration = Calibration(checkpoint, read_calibration_text(text, model), (), kept, feeds_back=["experts"])
        tensors = checkpoint.expert(1, 3)
        return [dict(calibration.of_expert(1, expert, tensors)) for expert in experts]


def weighed(rows: Tensor, weights: Tensor) -> Tensor:
    """The means of products of inputs ``[t, K]``, in fp64."""
    return (rows.double().T * weights.double() @ rows.double() / weights.double().sum()).float()


def inner_of(model: Path, rows: Tensor) -> Tensor:
    """What the last matrix of expert 3 is given."""
    with Checkpoint(model) as checkpoint:
        gate, up = (rows.float() @ checkpoint.expert(1, 3)["gate_up_proj"].float().T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def test_an_expert_is_weighed_by_its_own_tokens_and_a_tenth_of_others(model: Path, text: Path) -> None:
    """All 400 tokens are among the others."""
    generator = torch.Generator().manual_seed(0)
    of_first = torch.arange(400) % 3 == 0
    rows = (torch.randn(400, 128, generator=generator) * torch.where(of_first, 3.0, 1.0)[:, None]).bfloat16()
    first, second, none = moments_of(model, text, Kept(rows, of_first), (0, 1, 5))
    for found, own in ((first, of_first), (second, ~of_first), (none, torch.zeros(400))):
        weights = own + 0.1
        for matrix, inputs in (("gate_up_proj", rows), ("down_proj", inner_of(model, rows))):
            expected = weighed(inputs, weights)
            torch.testing.assert_close(found[matrix], expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
            assert expected.any()
    for matrix in ("gate_up_proj", "down_proj"):
        assert first[matrix].trace() > 2 * none[matrix].trace() > 2 * second[matrix].trace()


def test_an_expert_without_tokens_has_the_moments_of_its_layer(model: Path, text: Path) -> None:
    """Of more tokens than are taken as others, of which half are of another size."""
    of_first = torch.arange(2000) < 1000
    rows = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0)) * torch.where(of_first, 4.0, 1.0)[:, None]
    first, none = moments_of(model, text, Kept(rows.bfloat16(), of_first), (0, 5))
    assert none["gate_up_proj"].diagonal().mean() == pytest.approx((16 + 1) / 2, rel=0.1)
    own, others = 1000 * 16, 0.1 * 512 * (16 + 1) / 2
    assert first["gate_up_proj"].diagonal().mean() == pytest.approx((own + others) / (1000 + 51.2), rel=0.02)
    inner = [float(inner_of(model, part.bfloat16()).square().mean()) for part in (rows[:1000], rows)]
    assert none["down_proj"].diagonal().mean() == pytest.approx(inner[1], rel=0.15)
    expected = (1000 * inner[0] + 51.2 * inner[1]) / 1051.2
    assert first["down_proj"].diagonal().mean() == pytest.approx(expected, rel=0.02)
    assert inner[0] > 1.5 * inner[1] > 0


@pytest.mark.parametrize(("period", "least"), [(512, 0.0), (100, 0.5), (16, 0.5)])
def test_first_tokens_are_no_larger_a_share_of_the_others_than_of_the_text(
    model: Path, text: Path, period: int, least: float
) -> None:
    """The inputs of those at the begin of each sequence are enormous; a sample of 512 may have none of them."""
    is_first = torch.arange(8192) % period == 0
    rows = (
        torch.randn(8192, 128, generator=torch.Generator().manual_seed(0)) * torch.where(is_first, 100.0, 1.0)[:, None]
    )
    (none,) = moments_of(model, text, Kept(rows.bfloat16(), is_first), (5,))
    share = (float(none["gate_up_proj"].diagonal().mean()) - 1) / (100**2 - 1)
    assert least < share * period < 2


class Stopped(BaseException):
    """Ends a conversion from within its progress report."""


class StopNowAndThen:
    def __init__(self) -> None:
        self.phases: list[str] = []
        self._random = random.Random(0)

    def __call__(self, phase: str, done: float = -1.0, total: float | None = None) -> None:
        is_first = phase == "Calibrating" and phase not in self.phases
        if is_first or (self._random.random() < 0.1 and 0 <= done < (total or 1.0)):
            self.phases.append(phase)
            raise Stopped


def test_stopped_in_either_phase_and_resumed(model: Path, text: Path, stores: dict[str, Store], tmp_path: Path) -> None:
    stop, store = StopNowAndThen(), tmp_path / "store"
    while not is_store(store):
        with contextlib.suppress(Stopped):
            quantize(model, store, codec="nf4", dense_codec="nf4", calibrate=text, progress=stop)
    assert {"Calibrating", "Quantizing"} <= set(stop.phases)
    undisturbed = stores["calibrated"].path
    names = ["store.json", *(path.name for path in undisturbed.glob("*.safetensors"))]
    for path in (undisturbed / name for name in names):
        assert (store / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(names) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_another_text_does_not_resume(model: Path, text: Path, tmp_path: Path) -> None:
    def stop(phase: str, done: float = -1.0, total: float | None = None) -> None:
        if phase == "Calibrating":
            raise Stopped

    with contextlib.suppress(Stopped):
        quantize(model, tmp_path / "store", calibrate=text, progress=stop)
    with pytest.raises(StoreError, match="begun with another importances"):
        quantize(model, tmp_path / "store", calibrate="auto")


def test_a_damaged_calibration_begins_anew(model: Path, text: Path, stores: dict[str, Store], tmp_path: Path) -> None:
    def stop(phase: str, done: float = -1.0, total: float | None = None) -> None:
        if phase == "Quantizing" and done > 0:
            raise Stopped

    store = tmp_path / "store"
    with contextlib.suppress(Stopped):
        quantize(model, store, codec="nf4", dense_codec="nf4", calibrate=text, progress=stop)
    next((tmp_path / "store.calibration").glob("inputs-*")).write_bytes(b"damaged")
    quantize(model, store, codec="nf4", dense_codec="nf4", calibrate=text)
    name = "experts-00001.safetensors"
    assert (store / name).read_bytes() == (stores["calibrated"].path / name).read_bytes()


def test_a_folder_of_someone_else_stays(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "store.calibration").mkdir()
    (tmp_path / "store.calibration" / "letter.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"store\.calibration is not empty and not ours"):
        quantize(model, tmp_path / "store", calibrate=text)
    assert (tmp_path / "store.calibration" / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate": "no such text"}, r"no such text cannot be read: No such file"),
        ({"calibrate": "auto", "imatrix": "some.gguf"}, "one of --imatrix and --calibrate"),
        ({"calibrate": "auto", "scales": "absmax"}, "--scales absmax has no choice"),
        ({"calibrate": "auto", "codec": "bf16"}, "experts are kept in bf16"),
        ({"calibrate": "auto", "delete_source_shards": True}, "Leave --delete-source-shards out"),
    ],
)
def test_refused(model: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(model, tmp_path / "store", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.embed_tokens.weight", "nan", r"model\.embed_tokens\.weight: it has NaN weights"),
        ("model.norm.weight", "nan", r"model\.norm\.weight: it has NaN weights"),
        ("model.layers.1.self_attn.v_proj.weight", "nan", r"layers\.1\.self_attn\.v_proj\.weight: it has NaN weights"),
        ("model.layers.1.input_layernorm.weight", "inf", r"model\.layers\.1 gives NaN or infinite numbers"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "nan", r"Expert 3 of .*0\.mlp\.experts: gate_up_proj has NaN"),
        ("model.layers.1.mlp.experts.5.down_proj.weight", "inf", r"Expert 5 of .*1\.mlp\.experts: down_proj has NaN"),
        ("lm_head.weight", "nan", r"lm_head\.weight: weight has NaN or infinite weights"),
    ],
)
def test_damaged_weights_are_named(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setattr(calibration_text, "NUM_SEQUENCES", 2)
    folder = Path(shutil.copytree(model, tmp_path / "damaged"))
    stored = load_file(folder / "model.safetensors")
    stored[name].view(-1)[77] = float(value)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        quantize(folder, tmp_path / "store", codec="nf4", dense_codec="nf4", calibrate=text)


def test_a_damaged_expert_without_tokens_is_named(model: Path, text: Path) -> None:
    rows = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Checkpoint(model) as checkpoint:
        calibration = Calibration(
            checkpoint, read_calibration_text(text, model), (), Kept(rows, rows[:, 0] > 0), feeds_back=["experts"]
        )
        tensors = checkpoint.expert(1, 5)
        tensors["gate_up_proj"][3, 4] = float("nan")
        with pytest.raises(CheckpointError, match="gate_up_proj has NaN or infinite weights"):
            calibration.of_expert(1, 5, tensors)


def test_a_text_that_is_too_short_or_no_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a few words")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="has 11 tokens of this model; calibration needs at least 512"):
        quantize(model, tmp_path / "store", calibrate=tmp_path / "short")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        quantize(model, tmp_path / "store", calibrate=tmp_path / "binary")


def test_a_model_without_a_tokenizer(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "load_tokenizer", lambda folder: (None, "It needs a package."))
    with pytest.raises(ConfigError, match=r"needs the model's tokenizer\. It needs a package"):
        quantize(model, tmp_path / "store", calibrate="auto")


def test_a_model_with_an_encoder(text: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "seq2seq", "switch_transformers", vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path / "seq2seq")
    with pytest.raises(OffloadMoeError, match="has an encoder"):
        quantize(tmp_path / "seq2seq", tmp_path / "store2", calibrate=text)


def test_sequences_are_spread_over_the_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "NUM_POSITIONS", 4)
    monkeypatch.setattr(calibration_text, "NUM_SEQUENCES", 3)
    (tmp_path / "text").write_text("abcdefghijklmnop")
    found = read_calibration_text(tmp_path / "text", model)
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(row) for row in found.ids] == ["abcd", "ghij", "mnop"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("abcdefgh" + "-" * 30 + "ijklmnop" + "-" * 30 + "qrstuvwx", ["abcd", "klmn", "uvwx"]),
        ("abcdefgé" + "-" * 30 + "ijklmnöp" + "-" * 30 + "ärstuvwx", ["abcd", "klmn", "uvwx"]),
    ],
)
def test_of_a_large_file_windows_are_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: list[str]
) -> None:
    """Whose ends may be inside of a character."""
    for name, value in (("NUM_POSITIONS", 4), ("NUM_SEQUENCES", 3), ("WINDOW_BYTES", 8)):
        monkeypatch.setattr(calibration_text, name, value)
    (tmp_path / "text").write_text(content, encoding="utf-8")
    found = read_calibration_text(tmp_path / "text", model)
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(row) for row in found.ids] == expected


def test_a_text_of_any_length_takes_bounded_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with holes, of as many bytes as no memory has."""
    monkeypatch.setattr(calibration_text, "WINDOW_BYTES", 2048)
    with (tmp_path / "text").open("wb") as file:
        file.write("Straße ".encode() * 9000)
        file.truncate(1 << 42)
    found = read_calibration_text(tmp_path / "text", model)
    assert found.ids.shape == (16, 512)
    assert found.ids[0].any()


def test_a_large_file_that_is_no_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "WINDOW_BYTES", 2048)
    (tmp_path / "binary").write_bytes(b"\x80" * (2 << 20))
    (tmp_path / "cut").write_bytes(b"a" * (2 << 20) + "ß".encode()[:1])
    for name in ("binary", "cut"):
        with pytest.raises(ConfigError, match="is not UTF-8"):
            read_calibration_text(tmp_path / name, model)


def test_lines_of_any_ending_and_pipes(model: Path, tmp_path: Path) -> None:
    lines = [f"line {number} of this text" for number in range(50)]
    for name, ending in (("unix", "\n"), ("windows", "\r\n"), ("mac", "\r")):
        (tmp_path / name).write_bytes(ending.join(lines).encode())
    reading, writing = os.pipe()
    os.write(writing, "\n".join(lines).encode())
    os.close(writing)
    found = [read_calibration_text(tmp_path / name, model).ids for name in ("unix", "windows", "mac")]
    found.append(read_calibration_text(f"/dev/fd/{reading}", model).ids)
    os.close(reading)
    assert found[0].shape == (2, 512)
    for ids in found:
        assert torch.equal(ids, found[0])


@pytest.mark.parametrize("character", ["ä", "語"])
def test_tokens_without_an_embedding_are_refused(tmp_path: Path, character: str) -> None:
    num_rows = max(byte_tokenizer()(character).input_ids)
    write_checkpoint(tmp_path / "model", vocab_size=num_rows)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("some letters and " + character * 300, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"calibration text text has token \({num_rows}\), .* has {num_rows} rows"):
        quantize(tmp_path / "model", tmp_path / "store", codec="nf4", calibrate=tmp_path / "text")
    assert not list(tmp_path.glob("store*"))


def test_the_built_in_text_holds_none_of_the_held_out_text() -> None:
    words = BUILT_IN.read_text(encoding="utf-8").split()
    runs = {tuple(words[at : at + 8]) for at in range(len(words) - 7)}
    held_out = HELD_OUT.read_text(encoding="utf-8").split()
    assert len(runs) > 4000
    assert not any(tuple(held_out[at : at + 8]) in runs for at in range(len(held_out) - 7))
