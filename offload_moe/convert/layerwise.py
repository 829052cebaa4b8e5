"""A checkpoint's own forward with the weights of one decoder layer in memory, for the inputs of its matrices.

transformers' decoder runs once, on all sequences together. Each layer's weights are read from the checkpoint before the
layer runs and dropped behind it, and experts are read one after another: memory holds the embedding, one layer without
its experts, one expert, and the activations. T tokens, S sequences, L tokens per sequence, H hidden.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from offload_moe.checkpoint.checkpoint import Checkpoint
from offload_moe.checkpoint.experts import ExpertsModule, find_experts
from offload_moe.checkpoint.skeleton import skeleton_in
from offload_moe.convert.numbers import check_finite, check_numbers
from offload_moe.decode.dense import NarrowEmbedding
from offload_moe.decode.report import decoder_layers
from offload_moe.errors import CheckpointError, UnsupportedModelError
from offload_moe.experts.attach import detach_parameters
from offload_moe.experts.per_expert import ReferenceArithmetic
from offload_moe.experts.routing import group_by_expert
from offload_moe.families.text_model import TextModel
from offload_moe.quant import get_codec

DTYPE = torch.float32


class InputsLog(Protocol):
    """Receives the inputs of every layer as it finishes.

    num_done: layers that are skipped; `hidden` is then the output of the last of them, ``[S, L, H]``.
    """

    num_done: int
    hidden: Tensor | None

    def finish_layer(self, number: int, num_layers: int, inputs: Mapping[str, Tensor], hidden: Tensor | None) -> None:
        """Receives what the modules of a layer were given.

        inputs: module name -> ``[T, K]``, and the ids ``[T, top-k]`` of each experts module.
        hidden: the layer's output; None where the forward cannot be resumed behind it.
        """

    def finish_head(self, inputs: Mapping[str, Tensor]) -> None:
        """Receives the inputs of the output head, if that is one of the linears."""


def record_inputs(checkpoint: Checkpoint, ids: Tensor, linears: Iterable[str], log: InputsLog) -> None:
    """Run the decoder on ids ``[S, L]``, and log the inputs of all experts modules and of these linears.

    Raises: UnsupportedModelError where the model's layers cannot run one by one; CheckpointError for NaN weights and
        for layers that give no finite numbers; TransferError.
    """
    hf: TextModel = skeleton_in(checkpoint.folder, DTYPE)
    if hf.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(hf).__name__} has an encoder: its inputs cannot be calibrated. Leave --calibrate out."
        )
    experts = find_experts(hf)
    detach_parameters(experts)
    weights = _Weights(hf, checkpoint)
    names = {id(layer.module) for layer in experts}
    layers = list(decoder_layers(hf, lambda layer: any(id(module) in names for module in layer.modules())))
    recorder = _Recorder()
    for ordinal, layer in enumerate(experts):
        _bind(layer, _ReadExperts(checkpoint, ordinal, layer, recorder))
    for name in linears:
        hf.get_submodule(name).register_forward_pre_hook(_of_linear(name, recorder))
    decoder = layers[0][0].rpartition(".")[0].rpartition(".")[0]  # of a name such as model.layers.0
    weights.load_outside(decoder, [name for name, _ in layers])
    for number, (name, layer) in enumerate(layers):
        layer.forward = _Layer(number, len(layers), name, layer.forward, weights, recorder, log)
    with torch.inference_mode():
        output = hf.get_submodule(decoder)(input_ids=ids, use_cache=False)
        head = hf.get_output_embeddings()
        found = next((name for name in linears if hf.get_submodule(name) is head), None)
        if found is not None:
            log.finish_head({found: _rows(output.last_hidden_state)})


def ids_name(experts: str) -> str:
    """The name under which the choice of an experts module is kept."""
    return f"{experts}.ids"


def _rows(values: Tensor) -> Tensor:
    """``[..., K] -> [T, K]``, as they are kept."""
    return values.reshape(-1, values.shape[-1]).bfloat16()


class _Recorder:
    """The inputs of one layer, until it finishes."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.is_resumable = True  # until a layer passes on more than its output
        self._last: tuple[Tensor, Tensor] | None = None

    def add(self, name: str, values: Tensor) -> None:
        """Linears that share their inputs share what is kept of them."""
        if self._last is None or self._last[0] is not values:
            self._last = values, _rows(values)
        self.inputs[name] = self._last[1]

    def extend(self, name: str, rows: Tensor) -> None:
        """Of a module that is called several times."""
        self.inputs[name] = torch.cat([self.inputs[name], rows]) if name in self.inputs else rows

    def take(self) -> dict[str, Tensor]:
        inputs, self.inputs, self._last = self.inputs, {}, None
        return inputs


def _of_linear(name: str, recorder: _Recorder) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        recorder.add(name, args[0])

    return record


class _Weights:
    """The dense weights of a skeleton, read when they are needed."""

    def __init__(self, hf: TextModel, checkpoint: Checkpoint) -> None:
        self._hf = hf
        self._checkpoint = checkpoint

    def load_outside(self, decoder: str, layers: Iterable[str]) -> None:
        """The decoder's weights that belong to no layer."""
        inside = tuple(f"{name}." for name in layers)
        names = [name for name in self._checkpoint.dense if name.startswith(f"{decoder}.")]
        embedding = self._hf.get_input_embeddings()
        for name in (name for name in names if not name.startswith(inside)):
            if type(embedding) is nn.Embedding and self._owner(name)[0] is embedding:
                table = NarrowEmbedding(self._read(name), DTYPE)
                self._hf.set_submodule(name.rpartition(".")[0], table)
            else:
                self._set(name, self._read(name))

    def load(self, layer: str) -> None:
        """All of a layer's but its experts. Raises: UnsupportedModelError."""
        for name in self._names(layer):
            self._set(name, self._read(name))
        module = self._hf.get_submodule(layer)
        stranded = [name for name, value in module.named_parameters() if value.is_meta]
        if stranded:
            raise UnsupportedModelError(
                f"{type(self._hf).__name__}: {layer}.{stranded[0]} is no weight of that layer alone, so that the layer "
                "cannot be calibrated. Leave --calibrate out."
            )

    def drop(self, layer: str) -> None:
        for name in self._names(layer):
            owner, leaf = self._owner(name)
            if leaf in owner._parameters:
                self._set(name, owner._parameters[leaf].to("meta"))

    def _read(self, name: str) -> Tensor:
        value = self._checkpoint.dense_tensor(name)
        check_numbers(name, value)
        return value

    def _names(self, layer: str) -> list[str]:
        return [name for name in self._checkpoint.dense if name.startswith(f"{layer}.")]

    def _owner(self, name: str) -> tuple[Any, str]:
        owner, _, leaf = name.rpartition(".")
        return self._hf.get_submodule(owner), leaf

    def _set(self, name: str, value: Tensor) -> None:
        owner, leaf = self._owner(name)
        value = value.to(getattr(owner, leaf).dtype)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        else:
            owner.register_buffer(leaf, value)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The forward of a decoder layer, with its weights around it; a layer that is done returns its input."""

    number: int
    num_layers: int
    name: str
    forward: Callable[..., Any]
    weights: _Weights
    recorder: _Recorder
    log: InputsLog

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.number < self.log.num_done:
            given = args[0] if args else kwargs["hidden_states"]
            return self.log.hidden if self.number == self.log.num_done - 1 else given
        self.weights.load(self.name)
        result = self._run(args, kwargs)
        self.weights.drop(self.name)
        output = result if isinstance(result, Tensor) else result[0]
        if not output.isfinite().all():
            raise CheckpointError(
                f"{self.name} gives NaN or infinite numbers on the calibration text, as with damaged weights. Download "
                "the model again."
            )
        hidden = result if isinstance(result, Tensor) else None
        kept = hidden if self.recorder.is_resumable else None
        self.log.finish_layer(self.number, self.num_layers, self.recorder.take(), kept)
        return result

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = _entries(args, kwargs)
        result = self.forward(*args, **kwargs)
        if not isinstance(result, Tensor) or not _are_same(before, _entries(args, kwargs)):
            self.recorder.is_resumable = False
        return result


def _entries(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[object]:
    """What is in the mappings among a layer's arguments: in them some leave keys and values for later layers."""
    given = (value for value in (*args, *kwargs.values()) if isinstance(value, Mapping))
    return [entry for mapping in given for entry in mapping.values()]


def _are_same(some: list[object], others: list[object]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


class _ReadExperts:
    """The routed experts of one layer, read from the checkpoint one after another."""

    def __init__(self, checkpoint: Checkpoint, ordinal: int, layer: ExpertsModule, recorder: _Recorder) -> None:
        self._checkpoint = checkpoint
        self._ordinal = ordinal
        self._name = layer.name
        self._num_experts = layer.num_experts
        self._recorder = recorder
        self._arithmetic = reference_of(layer)

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._recorder.extend(self._name, _rows(hidden))
        self._recorder.extend(ids_name(self._name), top_k_index.int())
        routing = group_by_expert(top_k_index, self._num_experts)
        tokens, places = torch.tensor(routing.tokens), torch.tensor(routing.places)
        total = torch.zeros_like(hidden)
        for index, expert in enumerate(routing.experts):
            of, at = tokens[routing.pairs(index)], places[routing.pairs(index)]
            tensors = read_expert(self._checkpoint, self._ordinal, expert)
            output = self._arithmetic.apply(hidden[of], tensors)
            total.index_add_(0, of, self._arithmetic.weighted(output, top_k_weights[of, at, None], hidden.dtype))
        return total


def reference_of(layer: ExpertsModule) -> ReferenceArithmetic:
    """The arithmetic of a layer's experts on tensors in the module's layout."""
    return ReferenceArithmetic(layer.contract, layer.shape, get_codec("bf16"))


def read_expert(checkpoint: Checkpoint, layer: int, expert: int) -> dict[str, Tensor]:
    """An expert's tensors in fp32. Raises: CheckpointError where one is not finite."""
    tensors = {name: value.to(DTYPE) for name, value in checkpoint.expert(layer, expert).items()}
    check_finite(tensors, f"Expert {expert} of {checkpoint.layers[layer].name}: ")
    return tensors


def _bind(layer: ExpertsModule, experts: _ReadExperts) -> None:
    if layer.adapter is None:
        layer.contract.config._experts_implementation = "eager"
        layer.module.forward = experts
    else:
        layer.module.forward = layer.adapter.forward(layer.module, experts)
