"""What a checkpoint is: container, layers, bytes, bits per weight, and which engines load it. Reads headers, never weights.

Any checkpoint is told about: quantized by whom it may be, unquantized, or in a container that is not decoded. Bits per weight: *linear* counts all
bits stored for the quantized linears (codes, scales, zero points, permutations) over the number of their weights; *file* counts all bytes of the
weight files over all parameters, a tied one once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import FormatError, SourceError
from quantkit.formats.base import is_of_weights
from quantkit.formats.engine_rules import Stored, StoredLayer
from quantkit.formats.engines import CONTAINERS, Verdict, verdicts
from quantkit.formats.gguf_files import gguf_files, read_gguf_head
from quantkit.formats.kv_scales import in_words, kv_scheme
from quantkit.formats.moves import ambiguity
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import READ_METHODS
from quantkit.formats.stored_layers import (
    AnyPart,
    main_dtype,
    packs_whole_words,
    plain_linears,
    quantized_linears,
    scale_dtype,
    stored_shape,
    wrong_parts,
)  # fmt: skip
from quantkit.models.architecture import Architecture, describe, load_config
from quantkit.models.names import is_kv_scale


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One quantized linear [N, K]: its scheme (or its container's word for it) and all bytes stored of its weights, descriptions and biases aside."""

    name: str
    shape: tuple[int, int]
    scheme: str
    num_bytes: int

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bpw(self) -> float:
        return 8 * self.num_bytes / self.num_weights


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One tensor that is stored as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """A checkpoint in numbers.

    Attributes:
        container: "compressed-tensors", "gptq", "awq", ...; None when nothing is quantized.
        parameters: of the whole model; None where neither decoding nor the architecture tells.
        kv_cache: the type and scales that the checkpoint brings for its KV cache; None where it says nothing of it.
        file_bytes: of all weight files, headers included.
        is_tied: the head is the embedding and is stored once.
        notes: what a person should know, such as why the container is not decoded.
    """

    path: str
    container: str | None
    description: str
    architecture: str
    dtype: str
    layers: tuple[LayerSummary, ...]
    unquantized: tuple[TensorSummary, ...]
    parameters: int | None
    file_bytes: int
    num_files: int
    is_tied: bool
    kv_cache: str | None
    notes: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def linear_bpw(self) -> float | None:
        """Bits a weight of the quantized linears; None when there are none."""
        weights = sum(layer.num_weights for layer in self.layers)
        return 8 * sum(layer.num_bytes for layer in self.layers) / weights if weights else None

    @property
    def file_bpw(self) -> float | None:
        """Bits a parameter of the weight files."""
        return 8 * self.file_bytes / self.parameters if self.parameters else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = asdict(self) | {"linear_bpw": self.linear_bpw, "file_bpw": self.file_bpw}
        values["layers"] = [asdict(layer) | {"bpw": layer.bpw} for layer in self.layers]
        return json.loads(json.dumps(values))


def summarize(path: Path) -> Summary:
    """What the folder, or GGUF file, holds.

    Raises:
        SourceError: nothing here is a checkpoint.
        CheckpointError: a file is damaged, truncated, absent or half written.
    """
    path = Path(path)
    files = gguf_files(path)
    if files:
        return _of_gguf(path, files)
    try:
        opened = OpenedCheckpoint(path)
    except FormatError as error:
        return _of_undecoded(CheckpointReader(path), str(error))
    return _of_opened(opened)


def _of_opened(opened: OpenedCheckpoint) -> Summary:
    reader, dense = opened.reader, opened.dense_names
    shapes = {name: stored_shape(opened, name) for name in opened.schemes}
    parts = {name: [part for part in opened.parts(name) if is_of_weights(part)] for name in opened.schemes}
    sizes = {name: sum(reader.info(part).nbytes for part in found) for name, found in parts.items()}
    layers = tuple(LayerSummary(name, shapes[name], scheme.name, sizes[name]) for name, scheme in opened.schemes.items())
    config = reader.quantization_config or {}
    contradictions = wrong_parts(opened)
    stored = Stored(
        container=str(config.get("quant_method")) if opened.format else None,
        config=config,
        layers=tuple(StoredLayer(name, shapes[name], scheme) for name, scheme in opened.schemes.items()),
        plain=plain_linears(reader, dense),
        model_dtype=main_dtype(reader, dense),
        scale_dtype=scale_dtype(opened),
        packs_whole_words=packs_whole_words(opened, shapes),
        unread=contradictions[0] if contradictions else None,
    )
    parameters = sum(layer.num_weights for layer in layers) + sum(prod(reader.info(name).shape) for name in dense if not is_kv_scale(name))
    notes = tuple(f"config and tensors contradict each other: {problem}" for problem in contradictions[:1])
    unclear = None if contradictions else ambiguity(opened)
    return _summary(reader, stored, layers, dense, parameters, notes if unclear is None else (*notes, unclear))


def _of_undecoded(reader: CheckpointReader, reason: str) -> Summary:
    """What the configuration says, and what the model's architecture tells of the stored tensors."""
    config = reader.quantization_config or {}
    architecture = _architecture(reader)
    found = quantized_linears(reader, architecture) if architecture else []
    layers = tuple(LayerSummary(linear.name, linear.shape, _scheme_in_words(config), num_bytes) for linear, num_bytes in found)
    modules = tuple(f"{layer.name}." for layer in layers)
    dense = [name for name in reader.names if name.endswith(".bias") or not name.startswith(modules)]
    container = str(config.get("quant_method") or "unknown")
    stored = Stored(container, config, plain=plain_linears(reader, dense), model_dtype=main_dtype(reader, dense), unread=reason)
    parameters = sum(p.numel() for p in architecture.model.parameters()) if architecture else None
    settings = {key: value for key, value in config.items() if isinstance(value, str | int | float) and key != "quant_method"}
    notes = (reason, "its quantization_config says " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    return _summary(reader, stored, layers, dense, parameters, notes)


def _of_gguf(path: Path, files: list[Path]) -> Summary:
    heads = [read_gguf_head(file) for file in files]
    reason = f"GGUF is not read yet; quantkit reads {READ_METHODS}"
    notes = (reason, f"version {heads[0].version}, {sum(head.num_tensors for head in heads)} tensors, {heads[0].num_settings} settings")
    return Summary(
        str(path), "gguf", CONTAINERS["gguf"], "in the file", "in the file", (), (), None, sum(file.stat().st_size for file in files), len(files),
        False, None, notes, tuple(verdicts(Stored("gguf", unread=reason))),
    )  # fmt: skip


def _summary(
    reader: CheckpointReader,
    stored: Stored,
    layers: tuple[LayerSummary, ...],
    dense: Sequence[str],
    parameters: int | None,
    notes: tuple[str, ...] = (),
) -> Summary:
    container, config = stored.container, reader.config
    infos = [reader.info(name) for name in dense]
    assert stored.model_dtype is not None
    return Summary(
        path=str(reader.folder),
        container=container,
        description=CONTAINERS.get(container, f"quantization method {container!r}") if container else "not quantized",
        architecture=", ".join(config.get("architectures") or [str(config.get("model_type", "unknown"))]),
        dtype=_short(stored.model_dtype),
        layers=layers,
        unquantized=tuple(TensorSummary(info.name, info.shape, _short(info.dtype), info.nbytes) for info in infos),
        parameters=parameters,
        file_bytes=reader.total_bytes,
        num_files=len(reader.files),
        is_tied=_is_tied(reader),
        kv_cache=_kv_cache(reader),
        notes=notes,
        verdicts=tuple(verdicts(stored)),
    )


def _architecture(reader: CheckpointReader) -> Architecture | None:
    """The model as its config describes it, or None where transformers cannot build it."""
    try:
        return describe(load_config(reader.folder), AnyPart(reader.names))
    except SourceError:
        return None


def _is_tied(reader: CheckpointReader) -> bool:
    inner = reader.config.get("text_config")
    config = reader.config | (inner if isinstance(inner, dict) else {})
    has_head = any(name.startswith(("lm_head.", "embed_out.")) for name in reader.names)
    return bool(config.get("tie_word_embeddings", False)) and not has_head


def _kv_cache(reader: CheckpointReader) -> str | None:
    """What the configuration says of the cache, and whether scales are stored for it."""
    count = sum(map(is_kv_scale, reader.names))
    scheme = kv_scheme(reader.quantization_config)
    if scheme is None:
        return f"{count} scales are stored, and the config does not ask for them" if count else None
    return f"{in_words(scheme)}; {count} stored"


def _scheme_in_words(config: dict[str, Any]) -> str:
    """What a container that is not decoded calls its scheme."""
    if config.get("quant_method") == "bitsandbytes":
        return str(config.get("bnb_4bit_quant_type", "nf4")) if config.get("load_in_4bit") else "int8"
    bits = config.get("bits") or config.get("w_bit")
    return str(config.get("format") or (f"{config.get('quant_method')} {bits}-bit" if bits else config.get("quant_method")))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
