"""Which modules hold experts, and what one expert looks like."""

import resource

import pytest
import torch
from torch import nn

from offload_moe.checkpoint.convert import check_per_expert
from offload_moe.checkpoint.experts import expert_shape, find_experts, is_experts_module
from offload_moe.checkpoint.linears import projection_linears
from offload_moe.checkpoint.names import SourceGroup
from offload_moe.checkpoint.overlooked import overlooked_experts
from offload_moe.checkpoint.skeleton import build_skeleton
from offload_moe.errors import UnsupportedModelError
from tests.support.checkpoints import tiny_config


def unbound(model: nn.Module) -> list[str]:
    return overlooked_experts(model, [n for n, m in model.named_modules() if is_experts_module(m)])


pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_layer_is_described_from_its_module() -> None:
    model = build_skeleton(tiny_config("qwen3_moe"))
    layers = find_experts(model)
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    shape = layers[0].shape
    assert layers[0].num_experts == 4
    assert [(m.name, m.out_features, m.in_features) for m in shape.matrices] == [
        ("gate_up_proj", 48, 32),
        ("down_proj", 32, 24),
    ]
    assert (shape.biases, shape.is_transposed, shape.is_interleaved) == ((), False, False)
    assert layers[2].parameter_names() == (
        "model.layers.2.mlp.experts.gate_up_proj",
        "model.layers.2.mlp.experts.down_proj",
    )


def test_transposed_interleaved_and_biased() -> None:
    shape = find_experts(build_skeleton(tiny_config("gpt_oss")))[0].shape
    assert shape.is_transposed
    assert shape.is_interleaved
    assert shape.biases == (("gate_up_proj_bias", 96), ("down_proj_bias", 32))
    assert shape.module_shapes()["gate_up_proj"] == (32, 96)
    assert shape.matrices[0].out_features == 96


def test_experts_without_a_gate() -> None:
    shape = find_experts(build_skeleton(tiny_config("nemotron_h")))[0].shape
    assert [m.name for m in shape.matrices] == ["up_proj", "down_proj"]
    assert not shape.is_interleaved


def test_dense_layers_before_the_experts_do_not_count() -> None:
    layers = find_experts(build_skeleton(tiny_config("deepseek_v3")))
    assert [layer.name for layer in layers] == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]


def test_module_shapes_are_the_parameters_without_the_experts() -> None:
    for family in ("aria_text", "gpt_oss", "mixtral"):
        for layer in find_experts(build_skeleton(tiny_config(family))):
            for name, shape in layer.shape.module_shapes().items():
                assert getattr(layer.module, name).shape == (layer.num_experts, *shape)


def test_an_unknown_parameter_is_refused() -> None:
    module = find_experts(build_skeleton(tiny_config("mixtral")))[0].module
    module.register_parameter("expert_scale", nn.Parameter(torch.ones(4)))
    with pytest.raises(UnsupportedModelError, match="expert_scale"):
        expert_shape(module)


def test_experts_beside_the_registry_are_found_by_their_looks() -> None:
    model = build_skeleton(tiny_config("mixtral"))
    assert unbound(model) == []
    model.model.layers[1].experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    assert unbound(model) == ["model.layers.1.experts"]
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.experts \(ModuleList\)"):
        find_experts(model)


def test_shared_experts_are_dense() -> None:
    for family in ("qwen2_moe", "deepseek_v3"):
        assert unbound(build_skeleton(tiny_config(family))) == []


def test_nothing_of_a_skeleton_is_allocated_but_buffers() -> None:
    config = tiny_config("deepseek_v3", n_routed_experts=256, num_local_experts=256, hidden_size=7168)
    model = build_skeleton(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


def test_not_even_zeros_are_allocated() -> None:
    """Llama 4 makes its experts of zeros: 5 GB for one layer of Scout."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = tiny_config("llama4_text", hidden_size=5120, intermediate_size=8192, num_local_experts=16)
    assert all(parameter.is_meta for parameter in build_skeleton(config).parameters())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB on Linux


@pytest.mark.parametrize("family", ["llama4_text", "llama4", "qwen3_moe"])
def test_the_decoder_of_a_skeleton_has_its_layers(family: str) -> None:
    """transformers takes the whole of a Llama 4 model for it."""
    model = build_skeleton(tiny_config(family))
    assert len(model.get_decoder().layers) == 3
    assert model.get_decoder() is model.model
    assert not [name for name in model.state_dict() if "decoder" in name]


def test_projections_and_nothing_delicate() -> None:
    names = {name.rpartition(".")[2] for name in projection_linears(build_skeleton(tiny_config("deepseek_v3")))}
    assert names == {"q_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    tied = projection_linears(build_skeleton(tiny_config("qwen3_moe", tie_word_embeddings=True)))
    assert "lm_head" not in tied


@pytest.mark.parametrize(
    ("family", "in_projections"),
    [("qwen3_next", {"in_proj_qkvz"}), ("qwen3_5_moe_text", {"in_proj_qkv", "in_proj_z"}), ("jamba", set())],
)
def test_projections_of_gated_delta_rules_and_of_no_other_state(family: str, in_projections: set[str]) -> None:
    """Mamba reads its `in_proj` and `out_proj` as matrices; the small ones of delta rules are their gates."""
    linears = projection_linears(build_skeleton(tiny_config(family)))
    found = {name.rpartition(".")[2] for name in linears if ".mlp." not in name and ".self_attn." not in name}
    feed_forward = {"gate_proj", "up_proj", "down_proj"} if family == "jamba" else set()
    assert found - {"lm_head"} - feed_forward == in_projections | ({"out_proj"} if in_projections else set())


def test_an_operation_that_may_mix_experts_is_refused() -> None:
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

    def group(*operations: object) -> SourceGroup:
        converter = WeightConverter("experts.*.w", "experts.up_proj", list(operations))
        return SourceGroup(target="experts.up_proj", converter=converter)

    check_per_expert(group(MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)))
    for operations in ([Concatenate(dim=0)], [Transpose(0, 1)], [Concatenate(dim=1), MergeModulelist(dim=0)]):
        with pytest.raises(UnsupportedModelError, match="not known to work expert by expert"):
            check_per_expert(group(*operations))
