"""Which stored tensors make each parameter of the module tree: a file does not always use the tree's names, nor keep its tensors whole.

transformers knows, for every model type, the renamings and conversions by which it loads checkpoints of any age. They are applied here to every
stored name once, so there is no table of ours. It fuses the experts of a layer into one parameter; where a file keeps them one by one, they are
found under a path of their own too: `experts.3.gate_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter

KV_SCALES = ("k_scale", "v_scale")
"""Of keys and of values, beside an attention's projections; no parameters of transformers' modules."""
_OLD_KV_SCALE = re.compile(r"\.([kv])_proj\.(?:output_scale|\1_scale)$")


def kv_scale_paths(model: nn.Module) -> list[str]:
    """Where a model's scales would stand in its tree."""
    return [f"{path}.{leaf}" for path, module in model.named_modules() if hasattr(module, "layer_idx") for leaf in KV_SCALES]


def kv_scale_name(name: str) -> str:
    """A stored name with the older spellings of such a scale turned into today's."""
    return _OLD_KV_SCALE.sub(r".\1_scale", name)


def is_kv_scale(name: str) -> bool:
    """Whether a stored tensor has such a name, in one of the spellings that are in use."""
    return kv_scale_name(name).endswith(tuple(f".{leaf}" for leaf in KV_SCALES))


@dataclass(eq=False, slots=True)
class Conversion:
    """How transformers makes parameters of stored tensors; `sources` are (pattern it matched, stored name)."""

    converter: WeightConverter
    target: str
    sources: list[tuple[str, str]] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        """The parameters it makes: one of several tensors, or several of one."""
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


class StoredNames:
    """The names of one checkpoint, seen from the module tree.

    Args:
        model: as transformers built it, on the meta device.
        names: the checkpoint's dense names.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        self._model, self._built = model, _AsBuilt(model)
        self._tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._stored: dict[str, str] = {}
        self._made: dict[str, Conversion] = {}
        paths = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {name for name, _ in model.named_buffers()}
        paths |= set(kv_scale_paths(model))
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        for name in sorted(names, key=_natural):
            renamed = kv_scale_name(name)
            for renaming in renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            target, matched = self._in_tree(renamed, paths), None
            for converter in converters:
                converted, pattern = converter.rename_source_key(renamed)
                if pattern is not None:
                    target, matched = self._in_tree(converted, paths), (converter, pattern)
                    break
            if target not in paths and self._in_tree(name, paths) in paths:  # it has its name in the tree already
                target, matched = self._in_tree(name, paths), None
            if matched is None:
                self._stored.setdefault(target, name)
            else:
                self._convert(*matched, target, name, renamed)

    def find(self, parameter: str) -> str | None:
        """The stored tensor that is this parameter; None when there is none, or it is made of others."""
        return self._stored.get(parameter)

    def sources(self, parameter: str) -> list[str]:
        """The stored tensors that a parameter is made of, mostly one; none when the checkpoint lacks it."""
        stored = self._stored.get(parameter)
        if stored is not None:
            return [stored]
        return [name for _, name in self._made[parameter].sources] if parameter in self._made else []

    def is_tied(self, parameter: str) -> bool:
        """Whether it is one tensor with another parameter of the model."""
        return parameter in self._tied or parameter in self._tied.values()

    def owner(self, parameter: str) -> str:
        """The parameter whose tensor this one is: itself, or the one it is tied to where the checkpoint keeps no tensor of its own."""
        return parameter if self.sources(parameter) else self._tied.get(parameter, parameter)

    def read(self, parameter: str, get: Callable[[str], Tensor]) -> Tensor:
        """The value of a parameter that has sources."""
        stored = self._stored.get(parameter)
        if stored is not None:
            return get(stored)
        conversion = self._made[parameter]
        converter = deepcopy(conversion.converter)
        for pattern, name in conversion.sources:
            converter.add_tensor(conversion.target, name, pattern, get(name))
        made = converter.convert(conversion.target, model=self._built, config=self._model.config)[parameter]
        return made[0] if isinstance(made, list) else made

    def _in_tree(self, name: str, paths: set[str]) -> str:
        """A name with or without the model's base prefix, whichever the tree has."""
        prefix = f"{self._model.base_model_prefix}."
        other = name.removeprefix(prefix) if name.startswith(prefix) else f"{prefix}{name}"
        return other if name not in paths and other in paths else name

    def _convert(self, converter: WeightConverter, pattern: str, target: str, name: str, renamed: str) -> None:
        conversion = self._made.get(target) or Conversion(converter, target)
        conversion.sources.append((pattern, name))
        for made in conversion.targets:
            self._made[made] = conversion
        if isinstance(converter.operations[0], MergeModulelist):
            owner, _, leaf = target.rpartition(".")
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            number = [part for part in renamed.split(".") if part.isdigit()][-1]
            self._stored[f"{owner}.{number}.{parts[converter.source_patterns.index(pattern)]}.weight"] = name


class _AsBuilt:
    """What conversions ask of a model, its parameters' shapes and types, as it was before any of its modules was replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))

    def get_parameter(self, name: str) -> Tensor:
        return self._parameters[name]


def _natural(name: str) -> list[tuple[int, str]]:
    """Expert 10 comes after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
