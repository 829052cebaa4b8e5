"""Extensions in whole models: the tokens that they should give, and failures that end in an error at once."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat import chat_store
from support.families import PROMPT, eager_model, prompt_and_decode
from support.models import open_model
from support.tiny_models import COMMON, tiny_model
from transformers.models.dbrx import modeling_dbrx

from offload_moe import load
from offload_moe.checkpoint.experts import find_experts
from offload_moe.checkpoint.skeleton import load_config
from offload_moe.convert.quantize import quantize
from offload_moe.doctor.extensions import check_extensions
from offload_moe.engine.model import Model
from offload_moe.errors import ConfigError, ModelClosed, StoreError, UnsupportedModelError
from offload_moe.families import Bound, dbrx, find_adapter
from offload_moe.families.shapes import gated_shape
from offload_moe.plan import make_plan
from offload_moe.plan.machine import Machine
from offload_moe.quant import get_codec
from offload_moe.quant.int8 import Int8Codec
from offload_moe.system.stopping import StoppedInForward, stoppable
from tests.support.cli import load_cli
from tests.support.extensions import Site

IDS = torch.tensor([[3, 17, 5, 80, 41]])
FEW = 4  # slots, fewer than the experts that a chunk takes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_store(tmp_path_factory.mktemp("store"))


def generate(model: Model) -> list[int]:
    tokens = model.hf.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, disable_compile=True)
    return list(tokens[0].tolist())


@pytest.mark.usefixtures("example")
def test_a_policy_decides_in_a_model_and_changes_no_token(store: Path) -> None:
    with open_model(store, FEW) as model:
        expected = generate(model)
    with open_model(store, FEW, policy="least-weight") as model:
        assert generate(model) == expected
        policy = model.engine.hierarchy.ram.residency.policy
        assert policy.name == "least-weight"
        assert model.engine.hierarchy.ram.residency.num_evictions > 0
    assert len(set(expected)) > 6


@pytest.mark.parametrize("method", ["access", "insert", "victim", "remove"])
def test_a_policy_that_fails_ends_every_token_from_then_on(store: Path, site: Site, method: str) -> None:
    text = f"""
from offload_moe.residency.policy.lru import LRU
calls = []
class Torn(LRU):
    def __init__(self, *_):
        super().__init__()
    def {method}(self, *arguments):
        calls.append(arguments)
        if len(calls) == 12:
            raise ValueError("twelve")
        return super().{method}(*arguments)
"""
    site.write("torn-moe", {"offload_moe.policies": {"torn": "torn:Torn"}}, torn=text)
    with open_model(store, FEW, policy="torn") as model:
        with pytest.raises(ConfigError, match=r"The policy 'torn' of torn-moe 1\.0 failed: ValueError: twelve\."):
            for _ in range(3):
                generate(model)
        with pytest.raises(ConfigError, match="twelve"):
            generate(model)
        residency = model.engine.hierarchy.ram.residency
        assert not any(map(residency.num_leases, range(FEW)))
        assert len(sys.modules["torn"].calls) == 12
    with pytest.raises(ModelClosed):
        generate(model)


def write_model(folder: Path) -> Any:
    """A random model of the example in a folder. Returns it, in fp32."""
    from moe_extension_example.modeling import ExampleMoeConfig, ExampleMoeForCausalLM

    sizes = COMMON | {"num_local_experts": 6, "num_experts_per_tok": 2, "residual_multiplier": 0.3}
    torch.manual_seed(0)
    model = ExampleMoeForCausalLM._from_config(ExampleMoeConfig(**sizes), experts_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    kind = type(model)
    return kind.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


@pytest.mark.usefixtures("example")
class TestModelAndLayer:
    def test_are_computed_as_by_their_own_code(self, tmp_path: Path) -> None:
        own = write_model(tmp_path / "model")
        with load(tmp_path / "model", codec="bf16") as model:
            assert torch.equal(prompt_and_decode(model.hf), prompt_and_decode(own))

    def test_take_the_fast_path(self, tmp_path: Path) -> None:
        write_model(tmp_path / "model")
        with load(tmp_path / "model") as model, load(tmp_path / "model", fast_path=False) as slow:
            assert model.fast_path is not None
            assert [layer.kind for layer in model.fast_path.layers] == ["span"] * 3
            fast, expected = prompt_and_decode(model.hf, PROMPT[:1]), prompt_and_decode(slow.hf, PROMPT[:1])
            assert (fast - expected).norm() < 0.05 * expected.norm()
            assert not torch.equal(fast, expected)

    def test_of_a_wrong_declaration_keep_their_numbers_and_say_so(self, tmp_path: Path, monkeypatch: Any) -> None:
        import moe_extension_example.modeling as modeling

        write_model(tmp_path / "model")
        monkeypatch.setattr(modeling, "LAYER", replace(modeling.LAYER, residual_scale=1.0))
        with load(tmp_path / "model") as model, load(tmp_path / "model", fast_path=False) as slow:
            assert model.fast_path is not None
            assert "span" not in [layer.kind for layer in model.fast_path.layers]
            expected = prompt_and_decode(slow.hf, PROMPT[:1])
            assert (prompt_and_decode(model.hf, PROMPT[:1]) - expected).norm() < 0.05 * expected.norm()

    @pytest.mark.parametrize(
        ("declared", "reason"),
        [
            ({"residual_scale": "residual_multiplyer"}, "failed: AttributeError: .*residual_multiplyer"),
            (3, "is int, not a LayerClass"),
        ],
    )
    def test_of_a_broken_declaration_are_refused_by_name(
        self, tmp_path: Path, monkeypatch: Any, declared: Any, reason: str
    ) -> None:
        import moe_extension_example.modeling as modeling

        write_model(tmp_path / "model")
        made = declared if declared == 3 else replace(modeling.LAYER, **declared)
        monkeypatch.setattr(modeling, "LAYER", made)
        name = r"The layer 'ExampleMoeDecoderLayer' of moe-extension-example 1\.0 "
        with pytest.raises(ConfigError, match=name + reason):
            load(tmp_path / "model")


@pytest.mark.usefixtures("example")
class TestAdapter:
    """That the example's own gives the bits of eager is above."""

    def test_with_a_forward_of_its_own_gives_the_same_bits(self, tmp_path: Path, monkeypatch: Any) -> None:
        import moe_extension_example.modeling as modeling

        calls = []

        def forward(module: Any, bound: Bound) -> Any:
            return lambda hidden, ids, weights: calls.append(len(ids)) or bound(hidden, ids, weights)

        own = write_model(tmp_path / "model")
        monkeypatch.setattr(modeling, "ADAPTER", replace(modeling.ADAPTER, forward=forward))
        with load(tmp_path / "model", codec="bf16") as model:
            del calls[:]
            assert torch.equal(prompt_and_decode(model.hf), prompt_and_decode(own))
        assert calls == [PROMPT.numel()] * 3 + [2] * 9

    def test_with_a_forward_of_its_own_is_called_by_quantized_steps_too(self, tmp_path: Path, monkeypatch: Any) -> None:
        """What a native span computes without it would be other numbers."""
        import moe_extension_example.modeling as modeling

        def forward(module: Any, bound: Bound) -> Any:
            return lambda hidden, ids, weights: 2 * bound(hidden, ids, weights)

        write_model(tmp_path / "model")
        monkeypatch.setattr(modeling, "ADAPTER", replace(modeling.ADAPTER, forward=forward))
        found = []
        for fast_path in (True, False):
            with load(tmp_path / "model", codec="int8", fast_path=fast_path) as model:
                assert not fast_path or "span" not in str(model.fast_path)
                found.append(prompt_and_decode(model.hf))
        assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"describe": lambda module: module.nonesuch}, "failed: AttributeError"),
            ({"describe": lambda module: 3}, "failed: AttributeError"),
            ({"shape": gated_shape(64, 95)}, "does not describe ExampleMoeExperts: an expert's gate_up_proj has 12160"),
            ({"num_experts": 7}, "does not describe ExampleMoeExperts: there is no parameter 6.gate_proj.weight"),
            ({"parts": {}}, "does not describe ExampleMoeExperts: an expert's gate_up_proj has 12288 weights, its.* 0"),
            ({"forward": lambda module, bound: 1 / 0}, "failed: ZeroDivisionError"),
            ({"forward": lambda module, bound: lambda *_: 1 / 0}, "failed: ZeroDivisionError"),
            ({"class_name": "Others"}, "is about Others"),
        ],
    )
    def test_that_is_broken_is_refused_by_name(
        self, tmp_path: Path, monkeypatch: Any, change: dict[str, Any], reason: str
    ) -> None:
        import moe_extension_example.modeling as modeling

        write_model(tmp_path / "model")
        if change.keys() & {"shape", "num_experts", "parts"}:
            changed = dict(change)
            change = {"describe": lambda module: replace(modeling.describe(module), **changed)}
        monkeypatch.setattr(modeling, "ADAPTER", replace(modeling.ADAPTER, **change))
        name = r"The adapter 'ExampleMoeExperts' of moe-extension-example 1\.0 "
        with pytest.raises(ConfigError, match=name + reason), load(tmp_path / "model") as model:
            prompt_and_decode(model.hf)

    def test_lets_a_stopped_forward_through(self, tmp_path: Path, monkeypatch: Any) -> None:
        import moe_extension_example.modeling as modeling

        def forward(module: Any, bound: Bound) -> Any:
            return lambda hidden, ids, weights: bound(hidden, ids, weights)

        write_model(tmp_path / "model")
        monkeypatch.setattr(modeling, "ADAPTER", replace(modeling.ADAPTER, forward=forward))
        with load(tmp_path / "model", codec="bf16") as model:
            with stoppable(lambda: True), pytest.raises(StoppedInForward), torch.inference_mode():
                model.hf(PROMPT)
            assert len(prompt_and_decode(model.hf)) > 0

    def test_leaves_alone_what_it_says(self, monkeypatch: Any) -> None:
        import moe_extension_example.modeling as modeling

        class DenseExperts(torch.nn.Linear):
            __module__ = "moe_extension_example.dense"

        model = torch.nn.Module()
        model.experts = modeling.ExampleMoeExperts(modeling.ExampleMoeConfig(**COMMON, num_local_experts=4))
        model.others = DenseExperts(3, 3)
        with pytest.raises(UnsupportedModelError, match=r"others \(DenseExperts\)"):
            find_experts(model)
        monkeypatch.setattr(modeling, "ADAPTER", replace(modeling.ADAPTER, left_alone=("DenseExperts",)))
        assert [layer.name for layer in find_experts(model)] == ["experts"]


def test_an_adapter_replaces_no_built_in_one(site: Site) -> None:
    site.write("acme-moe", {"offload_moe.adapters": {"DbrxExperts": "absent:ADAPTER"}})
    experts = modeling_dbrx.DbrxExperts.__new__(modeling_dbrx.DbrxExperts)
    assert find_adapter(experts) is dbrx.ADAPTER
    assert [check.verdict for check in check_extensions()] == ["warning"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Model = int", "not a subclass of PreTrainedModel"),
        ("from transformers import MixtralForCausalLM as Model", "failed: ValueError: .*not consistent"),
        ("import nonesuch_module", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_broken_model_is_refused_by_name(tmp_path: Path, site: Site, text: str, reason: str) -> None:
    site.write("acme-moe", {"offload_moe.models": {"acme_moe": "acme:Model", "mixtral": "acme:Model"}}, acme=text)
    config = {"model_type": "acme_moe"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"The model 'acme_moe' of acme-moe 1\.0 .*{reason}"):
        load_config(tmp_path)
    checks = {check.found.split()[1]: check for check in check_extensions()}
    assert {name: check.verdict for name, check in checks.items()} == {"acme_moe": "problem", "mixtral": "warning"}
    config = {"model_type": "mixtral"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path).model_type == "mixtral"


def test_a_model_of_nobody_is_unsupported(tmp_path: Path, site: Site) -> None:
    site.write("acme-moe", {"offload_moe.models": {"acme_moe": "acme:Model"}})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "acme_mow"}))
    with pytest.raises(UnsupportedModelError, match=r"'acme_mow' is neither in .* nor registered by an installed"):
        load_config(tmp_path)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral") / "model"
    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def int6(mixtral: Path, example: Site) -> Path:
    """A store of it in the example's codec."""
    path = mixtral.with_name("store")
    return path if path.exists() else quantize(mixtral, path, codec="int6")


class TestCodec:
    def test_computes_with_the_weights_that_it_decodes(self, mixtral: Path, int6: Path) -> None:
        oracle = eager_model(mixtral)
        changes = []
        for layer in find_experts(oracle):
            for expert in range(layer.num_experts):
                tensors = {name: getattr(layer.module, name).data[expert] for name in layer.shape.module_shapes()}
                record = get_codec("int6").encode(layer.shape, tensors)
                for name, value in get_codec("int6").decode(layer.shape, record, torch.float32).items():
                    changes.append((tensors[name] - value).norm() / tensors[name].norm())
                    tensors[name].copy_(value)
        assert 0.01 < max(changes) < 0.03
        with pytest.warns(UserWarning, match="codec int6 has no native kernel"):
            model = load(int6, dense_codec="bf16", exact=True)
        with model:
            expected = prompt_and_decode(oracle)
            assert (prompt_and_decode(model.hf) - expected).norm() < 1e-5 * expected.norm()

    def test_is_refused_where_it_cannot_be_used(self, mixtral: Path, int6: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"codec int6 of an extension is computed on the CPU.* Leave --device cuda"
        ):
            load(int6, device="cuda")
        with pytest.raises(ConfigError, match="int6 is a format of experts"):
            load(mixtral, dense_codec="int6")

    def test_is_planned(self, mixtral: Path, int6: Path) -> None:
        machine = Machine(vram_bytes=8 << 30, ram_bytes=8 << 30, disk_bytes=8 << 30)
        for source in (int6, mixtral):
            plan = make_plan(source, machine, codec="int6")
            assert plan.placement.vram is None
            assert plan.store_bytes["nf4"] < plan.store_bytes["int6"] < plan.store_bytes["int8"]
        assert "int6" not in make_plan(mixtral, machine).store_bytes

    def test_that_is_not_installed_any_more_is_named(
        self, int6: Path, site: Site, capsys: pytest.CaptureFixture[str]
    ) -> None:
        site.remove()
        for command in ("verify", "plan"):
            assert load_cli().main([command, str(int6)]) == 1
            assert "is in the codec 'int6', which is neither built in nor" in capsys.readouterr().err
        with pytest.raises(StoreError, match="Install the package that has it"):
            load(int6)
        assert load_cli().main(["info", str(int6)]) == 0
        assert "'int6'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def layout(self, shape): return 1 / 0", "failed: ZeroDivisionError"),
        ("def layout(self, shape): return 3", "failed: TypeError: .* gives int, not a RecordLayout"),
        ("def encode(self, shape, tensors): return Int8Codec.encode(self, shape, tensors)[1:]", "is broken: encode"),
        ("def encode(self, shape, tensors): return None", "failed: AttributeError"),
        ("def decode(self, *arguments): return {}", "failed: KeyError"),
        (
            "def decode(self, shape, record, dtype): return Int8Codec.decode(self, shape, record, torch.half)",
            "is broken",
        ),
        ("def decode(self, *_): raise RuntimeError('too far')", "failed: RuntimeError: too far"),
    ],
)
def test_a_broken_codec_is_refused_by_name(site: Site, body: str, reason: str) -> None:
    text = "import torch\nfrom offload_moe.quant.int8 import Int8Codec\nclass Torn(Int8Codec):\n    "
    text += f"{body}\nCODEC = Torn()"
    site.write("torn-moe", {"offload_moe.codecs": {"torn": "torn:CODEC", "int8": "torn:CODEC"}}, torn=text)
    shape = gated_shape(64, 32)
    expert = {name: torch.ones(dims) for name, dims in shape.module_shapes().items()}
    with pytest.raises(ConfigError, match=rf"The codec 'torn' of torn-moe 1\.0 .*{reason}"):
        get_codec("torn").layout(shape)
        get_codec("torn").decode(shape, get_codec("torn").encode(shape, expert), torch.float32)
    assert type(get_codec("int8")) is Int8Codec


@pytest.mark.parametrize("target", ["torn:Torn", "torn:CLASS", "torn:NONE"])
def test_what_is_no_codec_is_refused_by_name(site: Site, target: str) -> None:
    text = "from offload_moe.quant.int8 import Int8Codec as CLASS\nNONE = None"
    site.write("torn-moe", {"offload_moe.codecs": {"torn": target, "a b": "torn:NONE"}}, torn=text)
    with pytest.raises(ConfigError, match=r"The codec 'torn' of torn-moe 1\.0 "):
        get_codec("torn")
    assert [check.verdict for check in check_extensions()] == ["problem"] * 2
