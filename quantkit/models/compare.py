"""Two models over the same rows of tokens, each streamed block by block, and what their next-token distributions differ by.

Each model's hidden states are carried through its blocks with one block's weights in memory; then both heads turn the states into logits, a few
tokens at a time. So the peak is one block, or two heads with a few tokens' logits, beside two sets of hidden states [rows, T, H].
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.core.divergence import Divergence, DivergenceResult, Perplexity, PerplexityResult
from quantkit.core.products import fast_products
from quantkit.core.scheme import Scheme
from quantkit.errors import CheckpointError, SourceError
from quantkit.models.activations import fake_quantize_inputs
from quantkit.models.architecture import Architecture
from quantkit.models.kv_states import Handle, handling_keys_and_values
from quantkit.models.streaming import BlockRunner, Place, Weights, decoder_linears

_log = logging.getLogger("quantkit")
_LOGITS_AT_ONCE = 1 << 25
"""Values of one model's logits held at once: 128 MB in float32."""

Progress = Callable[[str, int, int], None]
"""Told which model is at work, blocks done, and blocks in all."""


@dataclass(frozen=True, eq=False, slots=True)
class TokenRows:
    """Rows of tokens, and which predictions count.

    Attributes:
        input_ids, position_ids: int64 [R, T]. Positions that restart at 0 begin a text that attends to nothing before it.
        counted: bool [R, T]; place t stands for the prediction of token t + 1. The last place never counts.
    """

    input_ids: Tensor
    position_ids: Tensor
    counted: Tensor

    @classmethod
    def of_texts(cls, input_ids: Tensor, position_ids: Tensor | None = None, valid: Tensor | None = None) -> TokenRows:
        """Rows where every token counts that is predicted from the same text, except padding.

        Args:
            position_ids: by default 0 to T - 1 in every row.
            valid: bool [R, T], False on padding.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        counted = torch.zeros(input_ids.shape, dtype=torch.bool)
        counted[:, :-1] = position_ids[:, 1:] > 0
        if valid is not None:
            counted[:, :-1] &= valid[:, 1:]
        return cls(input_ids, position_ids, counted)

    @property
    def targets(self) -> Tensor:
        """int64 [R, T]: the next token at every place."""
        return self.input_ids.roll(-1, dims=1)

    @property
    def num_counted(self) -> int:
        return int(self.counted.sum())


@dataclass(frozen=True, eq=False, slots=True)
class StreamedModel:
    """A model to be streamed.

    Attributes:
        schemes: its quantized layers by checkpoint name; the inputs of those that quantize activations are quantized in the forward pass too.
        static_scales: the calibrated scale [1] of inputs that have one, by the same names.
        label: what to call it in progress and errors.
        cached: what its KV cache makes of a layer's keys and values; None for a cache that keeps them as they are.
    """

    architecture: Architecture
    weights: Weights
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    label: str = "the model"
    static_scales: Mapping[str, Tensor] = field(default_factory=dict)
    cached: Handle | None = None

    @property
    def vocabulary(self) -> int:
        return int(self.architecture.config.get_text_config().vocab_size)


@fast_products()
def compare(
    baseline: StreamedModel,
    quantized: StreamedModel,
    rows: TokenRows,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    kept: Path | None = None,
) -> DivergenceResult:
    """What the quantized model's distributions differ by from the baseline's.

    Args:
        batch_size: rows that pass through a block at once.
        dtype: the type in which blocks are computed; distributions are float32 whatever it is.
        kept: a file for the baseline's last hidden states on these rows: read where it is there, else written.

    Raises:
        SourceError: a tensor is absent or of the wrong shape, a model cannot be run block by block, or the two have unlike vocabularies.
        CheckpointError: a model gives NaN or infinite values; the message says which, and from where on.
        UsageError: no token counts.
    """
    sizes = baseline.vocabulary, quantized.vocabulary
    if sizes[0] != sizes[1]:
        raise SourceError(f"the baseline has {sizes[0]} tokens and the model {sizes[1]}: they are not the same model, so they cannot be compared")
    divergence = Divergence()
    for (base, quant), at in _logits([baseline, quantized], rows, batch_size, device, dtype, progress, kept):
        places = (rows.targets[at], rows.counted[at], rows.position_ids[at])
        divergence.add(base, quant, *(each.to(base.device) for each in places))
    return divergence.result()


@fast_products()
def perplexity(
    model: StreamedModel,
    rows: TokenRows,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> PerplexityResult:
    """The perplexity of one model; arguments and errors as `compare`."""
    collected = Perplexity()
    for (logits,), at in _logits([model], rows, batch_size, device, dtype, progress):
        collected.add(logits, rows.targets[at].to(logits.device), rows.counted[at].to(logits.device))
    return collected.result()


def logit_places(shape: torch.Size, vocabulary: int, at_once: int = _LOGITS_AT_ONCE) -> Iterator[Place]:
    """Parts of rows [R, T] small enough to hold their logits: whole rows, or pieces of one."""
    num_rows, length = shape
    rows = max(1, at_once // (vocabulary * length))
    columns = max(1, min(length, at_once // vocabulary))
    return ((slice(r, r + rows), slice(t, t + columns)) for r in range(0, num_rows, rows) for t in range(0, length, columns))


def _logits(
    models: list[StreamedModel], rows: TokenRows, batch_size: int, device: torch.device | str, dtype: torch.dtype, progress: Progress | None,
    kept: Path | None = None,
) -> Iterator[tuple[list[Tensor], Place]]:  # fmt: skip
    """Every model's logits of the same few tokens, and which those are; `kept` is of the first model."""
    runners = [BlockRunner(model.architecture, device=device, dtype=dtype) for model in models]
    hidden = []
    for model, runner in zip(models, runners, strict=True):
        found = _read_states(kept, rows) if kept is not None and not hidden else None
        if found is None:
            found = _last_hidden(model, runner, rows, batch_size, progress)
            if kept is not None and not hidden:
                _write_states(kept, found)
        hidden.append(found)
    for model, runner in zip(models, runners, strict=True):
        runner.load_outside(model.weights)
    vocabulary = models[0].vocabulary
    for at in logit_places(rows.input_ids.shape, vocabulary):
        logits = []
        for model, runner, states in zip(models, runners, hidden, strict=True):
            with _outside_inputs_quantized(model):
                logits.append(runner.logits(states[at], rows.input_ids[at], rows.position_ids[at]))
        yield logits, at
    for runner in runners:
        runner.unload_outside()


def _last_hidden(model: StreamedModel, runner: BlockRunner, rows: TokenRows, batch_size: int, progress: Progress | None) -> Tensor:
    """Hidden states [R, T, H] on the CPU that leave the last block."""
    ids, positions = rows.input_ids, rows.position_ids
    hidden = torch.empty(*ids.shape, model.architecture.config.get_text_config().hidden_size, dtype=runner.dtype)
    runner.load_outside(model.weights)
    for at in runner.places(None, positions, batch_size):
        hidden[at] = runner.embed(ids[at], positions[at]).cpu()
    runner.settle(hidden, ids, positions)
    runner.unload_outside()
    blocks = model.architecture.blocks
    for index, block in enumerate(blocks):
        runner.load(block.path, model.weights)
        cache = nullcontext() if model.cached is None else handling_keys_and_values(block.module, model.cached)
        with cache, fake_quantize_inputs(decoder_linears(block, model.architecture.model), model.schemes, model.static_scales):
            for at in runner.places(index, positions, batch_size):
                hidden[at] = runner.block(index, hidden[at], ids[at], positions[at]).cpu()
        runner.unload(block.path)
        if not torch.isfinite(hidden).all():
            fault = "NaN" if torch.isnan(hidden).any() else "infinite values"
            raise CheckpointError(f"{model.label} gives {fault} from {block.path} on: weights or scales are damaged, or overflow in {runner.dtype}")
        if progress:
            progress(model.label, index + 1, len(blocks))
    return hidden


def _read_states(kept: Path, rows: TokenRows) -> Tensor | None:
    """What an earlier run left; None where there is nothing whole."""
    try:
        states = load_file(kept)["states"]
        kept.touch()
    except (OSError, SafetensorError, KeyError):
        return None
    return states if states.shape[:2] == rows.input_ids.shape else None


def _write_states(kept: Path, states: Tensor) -> None:
    """Whole or not at all. A disk that is full costs the next run time, not this one its result."""
    part = kept.with_suffix(f".{os.getpid()}")
    try:
        save_file({"states": states}, part)
        part.replace(kept)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        _log.warning("the baseline's states could not be kept in %s, so the next run computes them again: %s", kept.parent, error)


@contextmanager
def _outside_inputs_quantized(model: StreamedModel) -> Iterator[None]:
    modules = {linear.name: model.architecture.model.get_submodule(linear.path) for linear in model.architecture.outside}
    with fake_quantize_inputs(modules, model.schemes, model.static_scales):
        yield
