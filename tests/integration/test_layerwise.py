"""The forward that reads a checkpoint layer by layer gives every matrix the inputs that the whole model gives it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.experts import find_experts
from offload_moe.checkpoint.skeleton import auto_class
from offload_moe.convert.jobs import linear_shapes
from offload_moe.convert.layerwise import ids_name, record_inputs
from tests.support.checkpoints import FAMILIES, FEW, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # upstream's, of models outside their usual sizes
REFUSED = ("switch_transformers", "nllb-moe", "diffusion_gemma")
ONE_EXPERT = ("deepseek_v4", "zaya")  # is chosen for all tokens by the random weights
REST = [family for family in FAMILIES if family not in (*FEW, *REFUSED)]
IDS = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))


class Log:
    """Keeps everything; `num_done` layers are skipped."""

    def __init__(self, num_done: int = 0, hidden: Tensor | None = None) -> None:
        self.num_done, self.hidden = num_done, hidden
        self.inputs: dict[str, Tensor] = {}
        self.outputs: list[Tensor | None] = []

    def finish_layer(self, number: int, num_layers: int, inputs: Mapping[str, Tensor], hidden: Tensor | None) -> None:
        self.inputs |= inputs
        self.outputs.append(hidden)

    def finish_head(self, inputs: Mapping[str, Tensor]) -> None:
        self.inputs |= inputs


def of_the_whole_model(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """The inputs of these linears in transformers' own forward."""
    model: Any = auto_class(Checkpoint(folder).model.config).from_pretrained(folder, dtype=torch.float32)
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, args[0].reshape(-1, args[0].shape[-1]).bfloat16())

        return keep

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))

    def watch_ids(name: str) -> Any:
        def keep(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            chosen = args[1] if len(args) > 1 else kwargs["top_k_index"]
            found.setdefault(ids_name(name), chosen.reshape(-1, chosen.shape[-1]))

        return keep

    for layer in find_experts(model):
        if layer.adapter is None:
            model.get_submodule(layer.name).register_forward_pre_hook(watch(layer.name))
            model.get_submodule(layer.name).register_forward_pre_hook(watch_ids(layer.name), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return found


def check_family(family: str, folder: Path) -> None:
    write_checkpoint(folder, family)
    with Checkpoint(folder) as checkpoint:
        names = [name for name in linear_shapes(checkpoint) if family != "inkling_text" or name != "lm_head"]
        log = Log()
        record_inputs(checkpoint, IDS, names, log)
        with_inputs = [layer.name for layer in checkpoint.layers if layer.name in log.inputs]
        assert len(with_inputs) >= len(checkpoint.layers) / 2  # experts of images have none
        for name in with_inputs:
            assert len(log.inputs[ids_name(name)]) == len(log.inputs[name]) >= IDS.numel()
    expected = of_the_whole_model(folder, [name for name in names if name in log.inputs])
    assert expected or family == "jetmoe"
    chosen = {name: expected.pop(name).int() for name in map(ids_name, with_inputs) if name in expected}
    for name, ids in chosen.items():
        assert torch.equal(log.inputs[name].sort().values, ids.sort().values)
    assert not chosen or family in ONE_EXPERT or any(len(ids.unique()) > 1 for ids in chosen.values())
    for name, values in expected.items():
        torch.testing.assert_close(log.inputs[name].float(), values.float(), rtol=2e-2, atol=1e-3)
        assert values.any()


@pytest.mark.parametrize("family", FEW)
def test_inputs_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", REST)
def test_inputs_of_every_other_family(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


def test_a_forward_continues_behind_the_layers_that_are_done(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        whole, rest = Log(), Log()
        record_inputs(checkpoint, IDS, (), whole)
        rest.num_done, rest.hidden = 2, whole.outputs[1]
        record_inputs(checkpoint, IDS, (), rest)
    last = checkpoint.layers[-1].name
    assert set(rest.inputs) == {last, ids_name(last)}
    assert torch.equal(rest.inputs[last], whole.inputs[last])


def test_no_forward_continues_behind_a_layer_that_leaves_keys_for_later_ones(tmp_path: Path) -> None:
    """Gemma 4: the last layers take keys and values from the last layer of their kind before them."""
    kinds = [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")]
    write_checkpoint(tmp_path, "gemma4_text", num_hidden_layers=5, layer_types=kinds, num_kv_shared_layers=2)
    with Checkpoint(tmp_path) as checkpoint:
        whole = Log()
        record_inputs(checkpoint, IDS, (), whole)
        assert [output is not None for output in whole.outputs] == [True, False, False, False, False]
        rest = Log(1, whole.outputs[0])
        record_inputs(checkpoint, IDS, (), rest)
    later = [layer.name for layer in checkpoint.layers[1:]]
    assert set(rest.inputs) == {*later, *map(ids_name, later)}
    assert all(torch.equal(values, whole.inputs[name]) for name, values in rest.inputs.items())


def test_a_forward_continues_behind_layers_that_only_read_what_all_are_given(tmp_path: Path) -> None:
    """From transformers 5.24 on, the last layer of each kind leaves its keys, though no layer takes them."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    write_checkpoint(tmp_path, "gemma4_text", num_hidden_layers=3, layer_types=kinds, num_kv_shared_layers=0)
    with Checkpoint(tmp_path) as checkpoint:
        log = Log()
        record_inputs(checkpoint, IDS, (), log)
    assert log.outputs[0] is not None
