"""Decoders that pass a token through their layers and do nothing else:

    x = scale * embedding(id);  for each layer: x = layer(x, rotary(positions));  norm(x)

Nearly all are, and their code spends most of its time elsewhere: masks, keyword arguments, empty hooks. A rehearsal
with stand-ins for the layers shows whether a decoder is one.

H hidden, D rotated dims.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from offload_moe.decode.dense import NarrowEmbedding
from offload_moe.decode.norm import norm_kernel
from offload_moe.decode.probe import NUM_CACHED, Refused, Uncovered, answer
from offload_moe.decode.rotary import Embeddings, RotaryTable, block_of
from offload_moe.decode.rotation import rotates_by_length
from offload_moe.families.cache_name import CACHE, with_cache
from offload_moe.families.read_layer import embedding_scale
from offload_moe.native import kernels

TOKEN = 1
FAR = 37  # a position that no cache of the rehearsal has


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Parts of a decoder, to be called as modules. output: the class of what its forward returns.

    embed_positions: the rotary embedding. is_by_position: whether it gives for each position what it gives for that one
    alone; then it is not called for each token. rotaries: of cos and sin for all rotated dims, and for half of them.
    """

    embedding: nn.Module
    table: kernels.EmbeddingKernel | None
    scale: float
    rotary: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    norm_kernel: kernels.NormKernel | None
    output: Any
    has_planes: bool  # of positions: text, time, height, width
    last_position: int
    embed_positions: Callable[[Tensor], Embeddings]
    is_by_position: bool
    rotaries: tuple[RotaryTable, RotaryTable]

    def bypassed(self) -> list[nn.Module]:
        """Modules that the pass does not call for each token."""
        replaced = {self.rotary: self.is_by_position, self.norm: self.norm_kernel, self.embedding: self.table}
        return [module for module, replacement in replaced.items() if replacement]

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """``[1, T]`` or ``[1, T, H]`` -> ``[1, T, H]``, which nothing else refers to."""
        if inputs_embeds is None and input_ids is not None and self.table is not None:
            found = self.table.rows(input_ids)
            if found is not None:
                return found
        x: Tensor = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return x.clone() if self.scale == 1.0 else x * self.scale

    def make_output(self, hidden: Tensor, cache: Any) -> Any:
        """What the decoder's forward returns. The rehearsal has checked what is checked when it makes one."""
        output: Any = self.output.__new__(self.output)
        output["last_hidden_state"], output[CACHE] = hidden, cache
        return output

    @property
    def probe_position(self) -> Tensor:
        """``[1, 1]``: the last one, where scaling by position would show."""
        return torch.tensor([[self.last_position]])

    @torch.inference_mode()
    def step_rotary(self, rotated_dims: int) -> RotaryTable:
        """For layers that rotate so many dims, 0 for none. Raises: Uncovered where the embeddings are of others."""
        embeddings = self.embed_positions(self.probe_position)
        for rotary in self.rotaries:
            if rotated_dims in (0, rotary.prepare(embeddings)[0].shape[-1]):
                return rotary
        raise Uncovered(f"a rotary embedding of other than {rotated_dims} dims")

    def positions(self, given: Tensor | None, cache: Any, num_tokens: int = 1) -> Tensor | None:
        """``[1, T]`` or planes ``[3, 1, T]``, as the rotary embedding takes them; None: positions of another kind."""
        if given is None:
            return self.next_positions(cache, num_tokens)
        if given.shape == (1, num_tokens):
            return given
        if self.has_planes and given.dim() == 3 and given.shape[1:] == (1, num_tokens) and len(given) in (3, 4):
            return given[-3:]
        return None

    def next_positions(self, cache: Any, num_tokens: int) -> Tensor:
        """``[1, T]``, of the next tokens behind the cache."""
        num_cached = cache.get_seq_length()
        return torch.arange(num_cached, num_cached + num_tokens)[None]

    def finish(self, x: Tensor) -> Tensor:
        """The norm behind the layers of ``[1, T, H]``, which it may overwrite, with the bits of each row alone."""
        if self.norm_kernel is None:
            return torch.cat([self.norm(row) for row in x.split(1, dim=1)], dim=1)
        self.norm_kernel.step(x, x)
        return x


def wiring_of(decoder: Any) -> Wiring:
    """The parts of a decoder. Raises: Uncovered where it does something else with a token."""
    parts: list[Any] = [getattr(decoder, name, None) for name in ("embed_tokens", "rotary_emb", "layers", "norm")]
    embedding, rotary, layers, norm = parts
    if not all(isinstance(part, nn.Module) for part in parts) or not isinstance(layers, nn.ModuleList):
        raise Uncovered("a decoder of other parts than an embedding, a rotary embedding, layers and a norm")
    scale = embedding_scale(decoder)
    try:
        output = _rehearse(decoder, embedding, scale, rotary, norm, (1, 1))
    except Refused as error:
        raise Uncovered("a decoder that does not take a token, its position and a cache") from error
    try:
        _rehearse(decoder, embedding, scale, rotary, norm, (4, 1, 1))
        has_planes = True
    except (Refused, Uncovered):
        has_planes = False
    last_position = getattr(decoder.config, "max_position_embeddings", 4096) - 1
    like = torch.zeros(1, 1, decoder.config.hidden_size, device=decoder.device)

    def embed_positions(positions: Tensor) -> Embeddings:
        embeddings: Embeddings = rotary(like, positions.to(like.device))
        return embeddings

    is_by_position = not rotates_by_length(rotary) and all(
        _is_by_position(embed_positions, block_of(position)) for position in (0, last_position)
    )
    return Wiring(
        embedding=embedding,
        table=kernels.EmbeddingKernel(embedding, scale) if _is_lookup(embedding) else None,
        scale=scale,
        rotary=rotary,
        layers=layers,
        norm=norm,
        norm_kernel=norm_kernel(norm),
        output=output,
        has_planes=has_planes,
        last_position=last_position,
        embed_positions=embed_positions,
        is_by_position=is_by_position,
        rotaries=(
            RotaryTable(embed_positions, is_half=False, is_by_position=is_by_position),
            RotaryTable(embed_positions, is_half=True, is_by_position=is_by_position),
        ),
    )


def _is_lookup(embedding: nn.Module) -> bool:
    if type(embedding) is NarrowEmbedding:
        return embedding.dtype == torch.float32
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return False
    return embedding.weight.dtype == torch.float32 and embedding.weight.is_cpu


@torch.inference_mode()
def _is_by_position(embed: Callable[[Tensor], Embeddings], positions: Tensor) -> bool:
    """Whether these positions ``[1, T]`` together give what each of them gives alone."""
    alone = [embed(position) for position in positions.split(1, dim=1)]
    if isinstance(alone[0], Tensor):
        return _are_equal(embed(positions), torch.cat(alone, dim=1))  # type: ignore[arg-type]
    return _are_equal(embed(positions), tuple(torch.cat(parts, dim=1) for parts in zip(*alone, strict=True)))


class _StandIn:
    """The forward of a layer: notes what it is given and returns something else of its kind."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.settings: list[dict[str, Any]] = []
        self.results: list[Tensor] = []

    def __call__(self, hidden_states: Tensor, **settings: Any) -> Tensor:
        result = hidden_states.roll(1, -1) * 1.5 + 0.25
        self.given.append(hidden_states)
        self.settings.append(settings)
        self.results.append(result)
        return result


@torch.inference_mode()
def _rehearse(
    decoder: Any, embedding: nn.Module, scale: float, rotary: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> type:
    """One token through the decoder, after cached ones and at a given position of this shape; its output's class.

    Raises: Uncovered, Refused.
    """
    layers = list(decoder.layers)
    ids = torch.tensor([[TOKEN]], device=decoder.device)
    given_positions = torch.full(shape, FAR, device=decoder.device)
    make_output = None
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for positions in (None, given_positions):
            stand_in = _StandIn()
            for layer in layers:
                layer.forward = stand_in
            cache = _filled_cache(decoder)
            out = answer(decoder.forward, input_ids=ids, position_ids=positions, **with_cache(cache), use_cache=True)
            expected = torch.full((1, 1), NUM_CACHED, device=decoder.device) if positions is None else positions[-3:]
            x = embedding(ids)
            _check(stand_in, len(layers), x if scale == 1.0 else x * scale, answer(rotary, x, expected))
            make_output = _check_output(out, norm(stand_in.results[-1]), cache)
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
    assert make_output is not None
    return make_output


def _filled_cache(decoder: Any) -> DynamicCache:
    cache = DynamicCache()
    keys, values = (torch.zeros(1, 1, NUM_CACHED, 8, device=decoder.device, dtype=decoder.dtype) for _ in "kv")
    cache.update(keys, values, 0)
    return cache


def _check(stand_in: _StandIn, num_layers: int, embedded: Tensor, embeddings: Any) -> None:
    is_chain = len(stand_in.given) == num_layers and all(
        given is result for given, result in zip(stand_in.given[1:], stand_in.results, strict=False)
    )
    if not is_chain or not torch.equal(stand_in.given[0], embedded):
        raise Uncovered("a decoder that changes what its layers give")
    for settings in stand_in.settings:
        if not _are_equal(settings.get("position_embeddings"), embeddings):
            raise Uncovered("a decoder whose layers are rotated differently")
        if not _hides_nothing(settings.get("attention_mask")):
            raise Uncovered("a decoder that hides tokens from the last one")


def _hides_nothing(mask: Any) -> bool:
    """Some attention functions are given a mask whatever it is."""
    if mask is None:
        return True
    return isinstance(mask, Tensor) and bool((mask if mask.dtype == torch.bool else mask == 0).all())


def _are_equal(got: Any, expected: Any) -> bool:
    if isinstance(got, Tensor) and isinstance(expected, Tensor):  # complex numbers
        return torch.equal(got, expected)
    if not isinstance(got, tuple) or not isinstance(expected, tuple) or len(got) != 2 or got[0].dim() != 3:
        return False
    return all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def _check_output(out: Any, hidden: Tensor, cache: DynamicCache) -> type:
    fields = {name: value for name, value in out.items() if value is not None}
    if fields.keys() != {"last_hidden_state", CACHE} or fields[CACHE] is not cache:
        raise Uncovered("a decoder that returns more than a hidden state and a cache")
    if not torch.equal(fields["last_hidden_state"], hidden):
        raise Uncovered("a decoder that changes what its norm gives")
    return type(out)
