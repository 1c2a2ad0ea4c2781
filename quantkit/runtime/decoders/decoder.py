"""The choice of a decoder for a loaded model, and the one that every model has: transformers' own modeling code on our attention."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from quantkit.ops import Mode
from quantkit.runtime.attention import AttentionFacts
from quantkit.runtime.decoders.lean import LeanDecoder
from quantkit.runtime.decoders.probe import Probe, probe
from quantkit.runtime.loader import LoadedModel
from quantkit.runtime.step import running

_log = logging.getLogger("quantkit")


class Decoder(Protocol):
    """Runs the tokens of a step; what they need beside themselves stands in the step's context."""

    layers: list[AttentionFacts]

    def logits(self, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """float32 [R, V] behind the tokens at `rows` of ids and positions, int64 [T]."""
        ...


class ModelingCode:
    """transformers' own code of the architecture."""

    def __init__(self, loaded: LoadedModel, layers: list[AttentionFacts]) -> None:
        self.layers, self._model = layers, loaded.model

    def logits(self, ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        out = self._model(input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=rows)
        return out.logits[0].float()


@torch.inference_mode()
def decoder_of(loaded: LoadedModel, mode: Mode, context: int) -> Decoder:
    """The lean decoder where it has the model's parts and gives its logits on a few tokens, else the model's own code.

    Args:
        mode: what the model was loaded for.
        context: the longest sequence that will run.

    Raises:
        SourceError: the model keeps something that cannot be paged.
    """
    probed = probe(loaded.model, loaded.vocabulary, context)
    _warn_of_window(loaded, probed.layers)
    with running(Probe()):
        found = LeanDecoder.of(loaded.model, probed, mode)
    if isinstance(found, LeanDecoder):
        return found
    _log.info("%s runs through transformers' own code: %s", loaded.name, found)
    return ModelingCode(loaded, probed.layers)


def _warn_of_window(loaded: LoadedModel, layers: list[AttentionFacts]) -> None:
    """Some families name one that their code in transformers has no mask for, such as OLMoE."""
    text = loaded.config.get_text_config()
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    may_slide = isinstance(window, int) and (kinds is None or "sliding_attention" in kinds)
    if may_slide and not any(facts.window for facts in layers):
        reason = f"names a window of {window} tokens that transformers' code for it does not apply"
        _log.warning("%s %s; every token sees all before it", loaded.name, reason)
