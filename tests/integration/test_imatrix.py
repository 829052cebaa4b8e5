"""`quantize --imatrix`: llama.cpp's importance matrices weigh the errors of experts and linears."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from offload_moe.checkpoint.imatrix import read_imatrix
from offload_moe.convert.quantize import quantize
from offload_moe.errors import CheckpointError, ConfigError
from offload_moe.native.kernels import fast_encoding
from offload_moe.quant import LEAST_ERROR, ExpertShape, Matrix, get_codec
from offload_moe.store import Store
from tests.support.checkpoints import write_checkpoint

SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 4, "num_hidden_layers": 2}
Sums = dict[str, tuple[np.ndarray, np.ndarray]]


def importances(
    *, num_experts: int = 4, hidden: int = 128, intermediate: int = 64, num_layers: int = 2, key: str = "gate"
) -> Sums:
    """What llama-imatrix gathers of such a model: the first 8 columns of every block matter most."""
    found: Sums = {}
    for layer in range(num_layers):
        for name, count, columns in (
            (f"ffn_{key}_exps", num_experts, hidden),
            ("ffn_down_exps", num_experts, intermediate),
            ("attn_q", 1, hidden),
        ):
            sums = np.where(np.arange(columns) % 64 < 8, 1000.0, 1.0).astype(np.float32)
            found[f"blk.{layer}.{name}.weight"] = np.tile(sums, (count, 1)) * 500, np.full((count, 1), 500, np.float32)
    return found


def write_imatrix(path: Path, found: Sums) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, (sums, counts) in found.items():
        writer.add_tensor(f"{name}.in_sum2", sums[0] if len(sums) == 1 else sums)
        writer.add_tensor(f"{name}.counts", counts[0] if len(counts) == 1 else counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imatrix")
    write_checkpoint(folder / "model", **SIZES)
    return folder / "model"


@pytest.fixture(scope="module")
def plain(model: Path) -> Store:
    return Store.open(quantize(model, model.parent / "plain", codec="nf4", dense_codec="int8"))


def errors_of(store: Store, exact: Store, layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Matrix -> the squared error of each column."""

    def tensors(of: Store) -> dict[str, torch.Tensor]:
        record = of.read_expert(layer, expert)
        return get_codec(of.codec).decode(of.layers[layer].shape, record, torch.float32)

    theirs = tensors(exact)
    return {name: (value - theirs[name]).square().sum(0) for name, value in tensors(store).items()}


@pytest.mark.parametrize("key", ["gate", "gate_up", "up"])
def test_important_columns_have_less_error(model: Path, plain: Store, tmp_path: Path, key: str) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", importances(key=key))
    weighed = Store.open(quantize(model, tmp_path / "store", codec="nf4", imatrix=path))
    exact = Store.open(quantize(model, tmp_path / "exact", codec="bf16"))
    before, after = (errors_of(store, exact, 1, 2) for store in (plain, weighed))
    for matrix in ("gate_up_proj", "down_proj"):
        assert 0 < after[matrix].view(-1, 64)[:, :8].sum() < 0.8 * before[matrix].view(-1, 64)[:, :8].sum(), matrix
    assert weighed.importances is not None
    assert (weighed.importances.kind, weighed.importances.name) == ("imatrix", "imatrix.gguf")


def test_linears_are_weighed_and_those_without_importances_are_named(model: Path, plain: Store, tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", importances())
    notices: list[str] = []
    weighed = Store.open(
        quantize(model, tmp_path / "store", codec="nf4", dense_codec="int8", imatrix=path, on_notice=notices.append)
    )
    named = [notice for notice in notices if "imatrix.gguf" in notice]
    assert len(named) == 1
    assert "no importances of 7 quantized linears (model.layers.0.self_attn.k_proj, ...)" in named[0]

    def record(store: Store, name: str) -> torch.Tensor:
        return store.read_dense(f"model.layers.1.self_attn.{name}.weight")

    assert not torch.equal(record(weighed, "q_proj"), record(plain, "q_proj"))
    assert torch.equal(record(weighed, "k_proj"), record(plain, "k_proj"))


def test_an_expert_with_few_inputs_has_the_mean_of_its_layer(tmp_path: Path) -> None:
    sums = np.array([[4000.0, 1000.0], [0.0, 0.0], [100.0, 900.0]], np.float32)
    counts = np.array([[1000.0], [0.0], [1000.0]], np.float32)
    found = read_imatrix(write_imatrix(tmp_path / "i.gguf", {"blk.0.ffn_down_exps.weight": (sums, counts)}))
    means = found["blk.0.ffn_down_exps.weight"].means(prior=32)
    assert torch.allclose(means[1], torch.tensor([4100.0, 1900.0]) / 2000)
    assert torch.allclose(means[0], torch.tensor([4.0, 1.0]), rtol=0.05)


def as_converted(found: Sums) -> Sums:
    """As llama.cpp converts its older form: all sums in one row, and one count."""
    return {name: (sums.reshape(1, -1), counts[:1]) for name, (sums, counts) in found.items()}


def test_a_file_converted_from_the_older_form_weighs_the_same(model: Path, tmp_path: Path) -> None:
    found = importances()
    for name, (sums, _) in found.items():
        sums *= np.linspace(1, 9, sums.size, dtype=np.float32).reshape(sums.shape)  # every expert has its own
        assert len(sums) == (1 if "attn" in name else 4)
    now, old = write_imatrix(tmp_path / "now.gguf", found), write_imatrix(tmp_path / "old.gguf", as_converted(found))
    stores = {
        path.stem: quantize(model, tmp_path / path.stem, codec="nf4", dense_codec="int8", imatrix=path)
        for path in (now, old)
    }
    for path in stores["now"].glob("*.safetensors"):
        assert (stores["old"] / path.name).read_bytes() == path.read_bytes()
    assert Store.open(stores["old"]).importances != Store.open(stores["now"]).importances


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": 8}, r"blk\.0\.ffn_gate_exps\.weight has 4 x 256 importances, .* 4 x 128 inputs"),
        ({"num_experts": 3, "hidden": 126}, r"blk\.0\.ffn_gate_exps\.weight has 1 x 378 importances"),
    ],
)
def test_a_converted_file_of_another_model_is_refused(
    model: Path, tmp_path: Path, sizes: dict[str, int], message: str
) -> None:
    path = write_imatrix(tmp_path / "old.gguf", as_converted(importances(**sizes)))
    with pytest.raises(CheckpointError, match=message):
        quantize(model, tmp_path / "store", imatrix=path)


def test_experts_share_the_one_count_of_the_older_form(tmp_path: Path) -> None:
    sums, counts = np.array([[3000.0, 1000.0, 0.0, 0.0, 500.0, 500.0]], np.float32), np.array([[1000.0]], np.float32)
    found = read_imatrix(write_imatrix(tmp_path / "i.gguf", {"blk.0.ffn_down_exps.weight": (sums, counts)}))
    means = found["blk.0.ffn_down_exps.weight"].of_matrices(3).means(prior=32)
    of_all = torch.tensor([3.5, 1.5]) / 3
    for row, own in zip(means, ([3.0, 1.0], [0.0, 0.0], [0.5, 0.5]), strict=True):
        torch.testing.assert_close(row, (1000 * torch.tensor(own) + 32 * of_all) / 1032)


def without(kind: str) -> Callable[[], Sums]:
    return lambda: {name: value for name, value in importances().items() if kind not in name}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            lambda: importances(num_experts=8),
            r"blk\.0\.ffn_gate_exps\.weight has 8 x 128 importances, .* 4 x 128 inputs",
        ),
        (lambda: importances(hidden=256), r"blk\.0\.ffn_gate_exps\.weight has 4 x 256 importances"),
        (lambda: importances(intermediate=128), r"blk\.0\.ffn_down_exps\.weight has 4 x 128 importances"),
        (lambda: importances(num_layers=5), r"importances of layer 4, this one has 2 layers"),
        (without("blk.1.ffn_down_exps"), r"no importances of blk\.1\.ffn_down_exps\.weight"),
        (without("blk.1.ffn_gate_exps"), r"no importances of blk\.1\.ffn_up_exps\.weight"),
        (
            lambda: {"blk.0.ffn_down_exps.weight": (-np.ones((4, 64), np.float32), np.ones((4, 1), np.float32))},
            "negative",
        ),
    ],
)
def test_importances_of_another_model_are_refused(
    model: Path, tmp_path: Path, found: Callable[[], Sums], message: str
) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", found())
    with pytest.raises(CheckpointError, match=message):
        quantize(model, tmp_path / "store", imatrix=path)
    assert not (tmp_path / "store").exists()


def test_files_that_are_no_importance_matrix(model: Path, tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(b"\x02\x00\x00\x00")
    with pytest.raises(CheckpointError, match=r"llama-imatrix --in-file old\.dat -o imatrix\.gguf"):
        quantize(model, tmp_path / "store", imatrix=tmp_path / "old.dat")
    with pytest.raises(CheckpointError, match=r"none\.gguf cannot be read: No such file"):
        quantize(model, tmp_path / "store", imatrix=tmp_path / "none.gguf")
    writer = gguf.GGUFWriter(tmp_path / "weights.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"none of its 1 tensors is named \*\.in_sum2"):
        quantize(model, tmp_path / "store", imatrix=tmp_path / "weights.gguf")


def test_an_importance_matrix_without_a_codec_that_it_weighs(model: Path, tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf", importances())
    with pytest.raises(ConfigError, match=r"--imatrix weighs the errors of nf4 and int8, .* kept in bf16"):
        quantize(model, tmp_path / "store", codec="bf16", imatrix=path)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_importances_of_zero_are_no_obstacle(name: str) -> None:
    """A column, or a whole block, without inputs."""
    shape = ExpertShape(matrices=(Matrix(name="weight", out_features=8, in_features=130),))
    rows = torch.randn(8, 130, generator=torch.Generator().manual_seed(0))
    moments = torch.rand(130, generator=torch.Generator().manual_seed(1))
    moments[:64] = 0
    moments[70] = 0
    codec = fast_encoding(get_codec(name), LEAST_ERROR, {"weight": moments})
    decoded = get_codec(name).decode(shape, codec.encode(shape, {"weight": rows}), torch.float32)["weight"]
    assert (decoded - rows).norm() < 0.12 * rows.norm()
