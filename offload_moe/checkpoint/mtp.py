"""The layer with which a checkpoint guesses the token after the next: multi-token prediction (MTP, nextn).

    x(i) = eh_proj([enorm(embedding(token(i + 1))), hnorm(h(i))])
    g(i) = norm(layer(x(i)));  logits(i + 2) = head(g(i))

h(i) is what the model's decoder gives for token i, behind its last norm; with g in its place the same layer guesses the
token behind that, and so on. Embedding and head are the model's own.

Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.2; transformers/modeling_layers.py, `MtpLayer`.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from offload_moe.checkpoint.header import TensorEntry
from offload_moe.checkpoint.mtp_forms import COUNTS, EMBEDDING, HEAD, form_of, why_left_out
from offload_moe.checkpoint.names import map_names
from offload_moe.checkpoint.skeleton import build_skeleton
from offload_moe.checkpoint.tensors import TensorSource
from offload_moe.checkpoint.unused import with_a_meaning
from offload_moe.checkpoint.weights import ModelWeights
from offload_moe.errors import CheckpointError, UnsupportedModelError
from offload_moe.families.text_model import MtpModel, TextModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHARED = frozenset({EMBEDDING, HEAD})


def build_mtp(config: "PreTrainedConfig") -> MtpModel | None:
    """The module of a model of this config on `meta`; None where its family has none of a known form.

    A model of one layer, with the projection in front of it: `enorm`, `hnorm` and `eh_proj`.
    """
    form = form_of(config)
    if form is None:
        return None
    dtype, config = config.dtype, copy.deepcopy(config.get_text_config(decoder=True))
    config.num_hidden_layers, config.tie_word_embeddings, config.dtype = 1, False, dtype or config.dtype
    for name, value in form.settings.items():
        setattr(config, name, value)
    module: MtpModel = cast("MtpModel", build_skeleton(config))
    norm, size = module.get_decoder().norm, config.hidden_size
    module.enorm, module.hnorm = copy.deepcopy(norm), copy.deepcopy(norm)
    module.eh_proj = nn.Linear(2 * size, size, bias=False, device="meta", dtype=norm.weight.dtype)
    return module


def brings_mtp(config: "PreTrainedConfig", names: Collection[str]) -> bool:
    """Whether a checkpoint of this config seems to have the layer.

    names: of its tensors; empty where they are unknown: then the config alone decides.
    """
    form, text = form_of(config), config.get_text_config(decoder=True)
    if form is None:
        return False
    counts = [count for name in COUNTS if (count := getattr(text, name, None)) is not None]
    is_there = not names or "eh_proj.weight" in form.parts(text.num_hidden_layers, names)
    return bool(max(counts, default=form.number)) and is_there


class MtpWeights(ModelWeights):
    """The weights of the module. sources: the checkpoint's tensors that it has."""

    def __init__(self, folder: Path, module: TextModel, tensors: "RenamedTensors", *, can_read: bool) -> None:
        """can_read: whether values can be read now.

        Raises: CheckpointError naming a tensor that is missing, unexpected or of a wrong shape; UnsupportedModelError.
        """
        super().__init__(folder, module, tensors, shared=SHARED)
        names = map_names(module, tensors.entries)
        if unexpected := with_a_meaning(tensors, (*names.unexpected, *names.ignored), may_read=can_read):
            raise CheckpointError(f"{tensors.entries[unexpected[0]].name} has no place in it")
        self.match(names.groups, can_compare=can_read)
        self.sources = frozenset(tensors.names.values())


def find_mtp(
    folder: Path, model: TextModel, tensors: TensorSource, left_out: Sequence[str], *, can_read: bool
) -> tuple[MtpWeights | None, tuple[str, ...]]:
    """The module's weights, and notices for the user. left_out: the tensors that the model itself does not have."""
    form, text = form_of(model.config), model.config.get_text_config(decoder=True)
    if form is None:
        notice = why_left_out(model.config, left_out)
        return None, (notice,) if notice else ()
    names = form.parts(getattr(text, "num_hidden_layers", None), left_out)
    own = {name: stored for name, stored in names.items() if name not in SHARED}
    module = build_mtp(model.config) if own else None
    if module is None:
        return None, ()
    try:
        return MtpWeights(folder, module, RenamedTensors(tensors, own), can_read=can_read), ()
    except (CheckpointError, UnsupportedModelError) as error:
        reason = str(error).rstrip(".")
        return None, (
            f"The checkpoint's layer for multi-token prediction is left out, because it is not whole: {reason}. "
            "Answers are the same without it.",
        )


class RenamedTensors:
    """Some tensors of a source under other names, by which `entries` lists them under those that messages have."""

    def __init__(self, stored: TensorSource, names: Mapping[str, str]) -> None:
        """names: new name -> stored name."""
        self.names = names
        self.entries: Mapping[str, TensorEntry] = {new: stored.entries[old] for new, old in names.items()}
        self.paths, self.notices = stored.paths, stored.notices
        self._stored = stored

    def paths_of(self, name: str) -> frozenset[Path]:
        return self._stored.paths_of(self.names[name])

    def release(self, path: Path) -> None:
        self._stored.release(path)

    def read(self, name: str) -> Tensor:
        return self._stored.read(self.names[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._stored.read_rows(self.names[name], start, stop)

    def is_by_rows(self, name: str) -> bool:
        return self._stored.is_by_rows(self.names[name])

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[Tensor]:
        return self._stored.chunks(self.names[name], chunk_bytes)

    def close(self) -> None:
        self._stored.close()
