"""A whole model with its hidden states rotated, planned before any work: what becomes of every stored tensor, or why it cannot be.

The rest of a conversion sees the rotated model as its source: it is calibrated, rounded, transformed and written like any other, and no engine needs
to know. Only quality is measured against the model as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.conversion.plan import Plan, unbuilt_matrices
from quantkit.conversion.rotation import Rotation
from quantkit.core.hadamard import in_words
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.errors import RecipeError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.streamed import FileOrder
from quantkit.models.architecture import Architecture, describe
from quantkit.models.rotated import rotate
from quantkit.models.rotation import DoesNotCommute, Fold


@dataclass(frozen=True, eq=False, slots=True)
class PlannedRotation:
    """What a rotation does to one checkpoint.

    Attributes:
        original: the model as it was.
        architecture: the rotated model, whose head is its own.
        folds: by the name of the stored tensor, as are the gains in them.
        head: the head's name and that of the embedding it was one tensor with; None where the source stores its head.
        words: for people.
        settings: the recipe's.
    """

    original: Architecture
    architecture: Architecture
    folds: dict[str, Fold]
    head: tuple[str, str] | None
    words: str
    settings: dict[str, Any]

    def add_to(self, plan: Plan) -> None:
        """The head that was the embedding as a tensor of its own, and what a person should know."""
        plan.notes.append(self.words)
        if self.head is None:
            return
        name, embedding = self.head
        like = next(tensor for tensor in plan.tensors if tensor.name == embedding)
        head = replace(like, name=name)
        plan.tensors.append(head)
        plan.carried.append(name)
        plan.parameters += torch.Size(head.shape).numel()
        plan.notes.append(f"the rotated model's head is not its embedding any more: {name} is stored too, {head.nbytes / 1e6:,.1f} MB")

    def configured(self, config: dict[str, Any]) -> dict[str, Any]:
        """A config.json that says so of its head."""
        if not self.original.stored.is_tied(_head_weight(self.original)):
            return config
        text = config.get("text_config")
        nested = {"text_config": text | {"tie_word_embeddings": False}} if isinstance(text, dict) and "tie_word_embeddings" in text else {}
        return config | {"tie_word_embeddings": False} | nested


@dataclass(frozen=True, eq=False, slots=True)
class RotatedWeights:
    """A checkpoint's dense weights, rotated when they are asked for: one tensor is in memory at a time.

    Attributes:
        dtypes: of tensors that are stored as they are; others come in float32.
    """

    source: FileOrder
    rotation: PlannedRotation
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.source or (self.rotation.head is not None and name == self.rotation.head[0])

    @property
    def schemes(self) -> dict[str, Scheme]:
        return self.source.schemes

    def quantized(self, module: str) -> QuantizedTensor:
        return self.source.quantized(module)

    def get(self, name: str) -> Tensor:
        head = self.rotation.head
        value = self.source.get(head[1] if head is not None and name == head[0] else name)
        fold = self.rotation.folds.get(name)
        if fold is None:
            return value
        gain = None if fold.gain is None else self.source.get(fold.gain)
        return fold.applied(value, gain, self.dtypes.get(name, torch.float32))


def plan_rotation(rotation: Rotation, original: Architecture, source: OpenedCheckpoint, origin: str, *, trust_remote_code: bool) -> PlannedRotation:
    """Find, on random weights, what has to be rotated.

    Raises:
        RecipeError: a part of the model does not commute with a rotation, or shares its tensors with others.
        SourceError: the model cannot be run block by block.
    """
    try:
        return _planned(rotation, original, source, trust_remote_code)
    except DoesNotCommute as error:
        kind = type(original.model).__name__
        way = "leave the rotation out (--rotation none); awq or smoothquant, which scale channels, may fit"
        raise RecipeError(f"{origin} ({kind}) cannot be rotated: {error}; {way}") from error


def _planned(rotation: Rotation, original: Architecture, source: OpenedCheckpoint, trust_remote_code: bool) -> PlannedRotation:
    unbuilt = unbuilt_matrices(source, original)
    if unbuilt:
        raise DoesNotCommute(f"{next(iter(unbuilt))} and {len(unbuilt) - 1} more matrices are of no module that transformers builds")
    head = _new_head(original)
    architecture = describe(_untied(original), [*source.names, *(head or ())[:1]], trust_remote_code=trust_remote_code)
    if architecture.stored.is_tied(_head_weight(architecture)):
        raise DoesNotCommute("its head cannot be untied from its embedding")
    rotated = rotate(architecture, seed=rotation.seed, with_heads=rotation.heads)
    names = _stored_names(architecture, rotated.folds)
    folds = {names[path]: fold if fold.gain is None else replace(fold, gain=names[fold.gain]) for path, fold in rotated.folds.items()}
    words = f"hidden states are rotated ({in_words(rotated.width)})"
    if rotation.heads:
        sizes = " and ".join(sorted({in_words(size) for size in rotated.heads.values()}))
        num_without = len(architecture.blocks) - len(rotated.heads)
        few = f" in all but {num_without} blocks" if num_without else ""
        words += f", and heads between values and attention's output ({sizes}){few}" if sizes else "; no block has heads that can be"
    return PlannedRotation(original, architecture, folds, head, words, rotation.model_dump())


def _untied(architecture: Architecture) -> Any:
    config = deepcopy(architecture.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return config


def _head_weight(architecture: Architecture) -> str:
    head = architecture.model.get_output_embeddings()
    return next((f"{path}.weight" for path, module in architecture.model.named_modules() if module is head), "")


def _new_head(architecture: Architecture) -> tuple[str, str] | None:
    path = _head_weight(architecture)
    if architecture.stored.sources(path):
        return None
    embedding = architecture.stored.find(architecture.stored.owner(path))
    if embedding is None:
        raise DoesNotCommute("its head is no tensor of the checkpoint")
    return path, embedding


def _stored_names(architecture: Architecture, folds: Mapping[str, Fold]) -> dict[str, str]:
    """The stored tensor of every parameter that changes, which must be no other's."""
    owners: dict[str, set[str]] = defaultdict(set)
    for path, _ in architecture.model.named_parameters(remove_duplicate=False):
        for name in architecture.stored.sources(path):
            owners[name].add(path)
    names = {}
    for path in folds:
        name = architecture.stored.find(path)
        if name is None:
            raise DoesNotCommute(f"{path} is stored as {', '.join(architecture.stored.sources(path)[:3]) or 'nothing'}")
        if owners[name] - {path} or architecture.stored.is_tied(path):
            raise DoesNotCommute(f"{path} is shared with another part of the model")
        names[path] = name
    return names
