"""Gated delta rules: a step of the kernel beside transformers' modules, and the same bits in every instruction set."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, Qwen3_5MoeTextConfig, Qwen3NextConfig
from transformers.cache_utils import LinearAttentionLayer
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from offload_moe.decode.delta import DeltaForward, fuse_delta_rules, projection_names
from offload_moe.errors import ConfigError
from offload_moe.families.cache_name import with_states
from offload_moe.native import kernels
from tests.support.kernels import PANEL_SETS

pytestmark = pytest.mark.usefixtures("best_kernels_afterwards")

# Key and value dims, heads of keys and of values, taps.
SHAPES = [(16, 32, 2, 4, 4), (32, 16, 1, 1, 2), (16, 80, 3, 3, 3), (128, 128, 2, 6, 4)]
KINDS = {
    "qwen3_next": (Qwen3NextConfig, Qwen3NextGatedDeltaNet),
    "qwen3_5": (Qwen3_5MoeTextConfig, Qwen3_5MoeGatedDeltaNet),
}


def module_of(kind: str, shape: tuple[int, int, int, int, int] = SHAPES[0]) -> Any:
    make_config, make = KINDS[kind]
    key_dim, value_dim, num_keys, num_values, taps = shape
    config = make_config(
        hidden_size=24,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_num_key_heads=num_keys,
        linear_num_value_heads=num_values,
        linear_conv_kernel_dim=taps,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
    )
    torch.manual_seed(key_dim)
    module = make(config, 1).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    module.norm.weight.data.uniform_(0.5, 1.5)
    module.dt_bias.data.uniform_(-3, 3)
    return module


def cache_of(module: Any, prompt: Tensor, forward: Any) -> Any:
    cache = Cache(layers=[LinearAttentionLayer() for _ in range(2)])
    forward(prompt, **with_states(cache))
    return cache


def states_of(cache: Any) -> list[Tensor]:
    return [cache.get_conv_state(1, state_idx=0), cache.get_recurrent_state(1, state_idx=0)]


def steps(module: Any, forward: Any, num_steps: int = 6) -> list[Tensor]:
    """Results behind a prompt, and the states at the end."""
    x = torch.randn(7 + num_steps, 24, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        cache = cache_of(module, x[None, :7], forward)
        found = [forward(each[None], **with_states(cache)) for each in x[7:].split(1)]
        return [*found, *states_of(cache)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_gives_the_modules_results_and_states(kind: str, shape: tuple[int, int, int, int, int]) -> None:
    module = module_of(kind, shape)
    expected = steps(module, module.forward)
    assert fuse_delta_rules(module) == 1
    assert isinstance(module.forward, DeltaForward)
    for got, wanted in zip(steps(module, module.forward), expected, strict=True):
        assert wanted.abs().max() > 1e-3
        assert (got - wanted).norm() <= 3e-6 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(kind: str) -> None:
    found = []
    for name in (*PANEL_SETS, "portable"):
        kernels.select_instruction_set(name)
        for num_threads in (1, 3):
            kernels.set_threads(num_threads)
            module = module_of(kind, SHAPES[2])
            found.append(steps(module, DeltaForward(module)))
    kernels.set_threads(1)
    for each in found[1:]:
        assert all(torch.equal(got, first) for got, first in zip(each, found[0], strict=True))


def kernel_of(module: Any) -> kernels.LinearAttentionKernel:
    parts = [getattr(module, name) for name in (*projection_names(module), "out_proj")]
    *inputs, output = (kernels.Linear.of_numbers(part.weight.detach()) for part in parts)
    return kernels.LinearAttentionKernel(DeltaForward(module).kernel, inputs, output)


def moved_on(module: Any, xs: Tensor, num_rows: int) -> list[Tensor]:
    """What the kernel of the module gives for a token of each of some sequences, so many at a time; their states."""
    kernel = kernel_of(module)
    prompt = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        caches = [states_of(cache_of(module, prompt + at, module.forward)) for at in range(len(xs))]
    outs = []
    for first in range(0, len(xs), num_rows):
        states = caches[first : first + num_rows]
        out = torch.full((len(states), 24), torch.nan)
        kernel.step(xs[first : first + num_rows].contiguous(), states, out)
        outs.append(out)
    return [torch.cat(outs), *(state for states in caches for state in states)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_sequences_have_the_bits_of_each_alone_in_every_set(kind: str) -> None:
    module = module_of(kind, SHAPES[2])
    xs = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
    found = []
    for name in (*PANEL_SETS, "portable"):
        kernels.select_instruction_set(name)
        found += [moved_on(module, xs, num_rows) for num_rows in (1, 3, 5)]
    for each in found[1:]:
        assert all(torch.equal(got, first) for got, first in zip(each, found[0], strict=True))
    prompt = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        for at, x in enumerate(xs):
            cache = cache_of(module, prompt + at, module.forward)
            expected = [module.forward(x[None, None], **with_states(cache))[0, 0], *states_of(cache)]
            for got, wanted in zip((found[0][0][at], *found[0][1 + 2 * at : 3 + 2 * at]), expected, strict=True):
                assert wanted.abs().max() > 1e-3
                assert (got - wanted).norm() <= 3e-6 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_sequence_have_the_bits_of_one_after_the_other(kind: str) -> None:
    module = module_of(kind, SHAPES[2])
    kernel = kernel_of(module)
    xs = torch.randn(5, 24, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        inputs, state = states_of(cache_of(module, torch.randn(1, 7, 24), module.forward))
    found = []
    for num_threads, num_rows in ((1, 1), (1, 5), (3, 5), (3, 2)):
        kernels.set_threads(num_threads)
        states, outs = (inputs.clone(), state.clone()), []
        for rows in xs.split(num_rows):
            outs.append(torch.full_like(rows, torch.nan))
            kernel.step(rows.contiguous(), [states] * len(rows), outs[-1])
        found.append([torch.cat(outs), *states])
    kernels.set_threads(1)
    assert not torch.equal(found[0][2], state)
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))


def test_states_that_are_no_keyword_are_found() -> None:
    module = module_of("qwen3_next")
    expected = steps(module, DeltaForward(module))

    class Positional:
        def __init__(self) -> None:
            self._forward = DeltaForward(module)

        def __call__(self, x: Tensor, **states: Any) -> Tensor:
            (cache,) = states.values()
            return self._forward(x, cache)  # type: ignore[no-any-return]

    assert all(map(torch.equal, steps(module, Positional()), expected))


def test_prompts_batches_and_calls_without_states_take_the_modules_own_forward() -> None:
    module = module_of("qwen3_next")
    fused, x = DeltaForward(module), torch.randn(2, 3, 24)
    with torch.inference_mode():
        assert torch.equal(fused(x), module.forward(x))
        assert torch.equal(fused(x[:1, :1], attention_mask=None), module.forward(x[:1, :1]))
        one, other = (cache_of(module, x, forward) for forward in (fused, module.forward))
        assert torch.equal(fused(x[:, :1], **with_states(one)), module.forward(x[:, :1], **with_states(other)))
        assert all(map(torch.equal, states_of(one), states_of(other)))
    step = x[:1, :1].clone().requires_grad_()
    assert fused(step, **with_states(cache_of(module, x[:1], module.forward))).requires_grad


@pytest.mark.parametrize("bias", [-100.0, 19.9, 20.1, 100.0])
def test_times_of_every_size_fade_the_state_as_the_module_does(bias: float) -> None:
    module = module_of("qwen3_next")
    module.dt_bias.data.fill_(bias)
    expected, got = steps(module, module.forward, 2)[-1], steps(module, DeltaForward(module), 2)[-1]
    assert got.isfinite().all()
    assert (got - expected).norm() <= 3e-6 * expected.norm()


def test_a_module_that_computes_something_else_keeps_its_forward() -> None:
    module = module_of("qwen3_next")
    module.norm.variance_epsilon = 0.5
    assert fuse_delta_rules(module) == 1, "an epsilon is a setting"
    other = module_of("qwen3_next")
    other.activation = "gelu"
    assert fuse_delta_rules(other) == 0
    changed = module_of("qwen3_next")
    original = changed.forward
    changed.forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)
    assert fuse_delta_rules(changed) == 0


@pytest.mark.parametrize("shape", [(24, 32, 2, 4, 4), (16, 272, 1, 1, 4)])
def test_dims_that_the_kernel_does_not_take_are_left_to_the_module(shape: tuple[int, int, int, int, int]) -> None:
    module = module_of("qwen3_next", shape)
    with pytest.raises(ConfigError, match="16 to 256 dims in steps of 16"):
        DeltaForward(module)
    assert fuse_delta_rules(module) == 0
