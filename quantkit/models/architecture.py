"""A decoder as blocks of linears, found in the module tree that transformers builds from a config, without weights.

No table of model families: the blocks are the largest list of modules, the linears are the Linear and Conv1D modules in them, and whatever
else holds a matrix is named as left alone. Anything transformers can build as a causal language model is understood.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from quantkit.errors import SourceError
from quantkit.models.experts import can_separate, is_fused, separate
from quantkit.models.names import StoredNames, kv_scale_paths


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix multiplication of a block.

    Attributes:
        path: the module's path in the whole model.
        name: the module's name in the checkpoint; its weight is `name + ".weight"`.
        shape: (N, K), whatever the order in which the file keeps it.
        is_transposed: the file keeps [K, N] (GPT-2's Conv1D).
    """

    path: str
    name: str
    shape: tuple[int, int]
    is_transposed: bool = False


@dataclass(eq=False, slots=True)
class Block:
    path: str
    module: nn.Module
    linears: list[Linear]
    left_alone: dict[str, str]
    """Matrices that are not Linears, or must not be quantized, by checkpoint name, with the reason."""
    routers: list[str]
    """Paths of the modules that score experts, Linears or not."""

    @property
    def kind(self) -> Hashable:
        """Equal for blocks that are built alike, whatever their weights."""
        return tuple(
            (name, type(module), *((leaf, tuple(parameter.shape)) for leaf, parameter in module.named_parameters(recurse=False)))
            for name, module in self.module.named_modules()
        )


@dataclass(eq=False, slots=True)
class Architecture:
    """A model on the meta device and what was found in it."""

    config: PretrainedConfig
    model: nn.Module
    blocks: list[Block]
    stored: StoredNames
    outside: list[Linear]
    """Linears outside the blocks: the head and projections around it."""

    @property
    def context(self) -> int:
        """The longest sequence the model was made for."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2048)

    def unplaced(self, names: Iterable[str]) -> list[str]:
        """Those of these dense names that the model has no place for: layers beyond its depth, or that only engines build."""
        places = [*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers(remove_duplicate=False)]
        paths = [*(path for path, _ in places), *kv_scale_paths(self.model)]
        known = {source for path in paths for source in self.stored.sources(path)}
        return [name for name in names if name not in known]


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The checked config of a causal language model.

    Raises:
        SourceError: there is no config, it holds values of a wrong type, the architecture is unknown, needs remote code, or is no decoder.
    """
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json, so it is no Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise SourceError(_unknown(folder, error)) from error
    except Exception as error:  # what transformers raises for values of a wrong type is not one family
        raise SourceError(f"{folder / 'config.json'} is damaged: {_reason(error)}") from error
    _require_decoder(config)
    return config


def describe(config: PretrainedConfig, names: Iterable[str], *, trust_remote_code: bool = False) -> Architecture:
    """Build the module tree without weights and find its blocks and linears.

    Args:
        names: the checkpoint's dense names: fused experts are separated only where the checkpoint keeps them apart.

    Raises:
        SourceError: transformers cannot build the model, or it has no list of blocks.
    """
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # a missing or wrong value of the config shows as whatever the model's own code raises
        where = f" from {Path(config.name_or_path) / 'config.json'}" if config.name_or_path else ""
        raise SourceError(f"transformers cannot build {config.model_type!r} as a causal language model{where}: {_reason(error)}") from error
    model.eval()
    stored = StoredNames(model, names)
    path, block_list = _block_list(model)
    blocks = [_block(f"{path}.{i}", module, stored) for i, module in enumerate(block_list)]
    outside = [_linear(p, m, stored) for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and not p.startswith(f"{path}.")]
    return Architecture(config, model, blocks, stored, outside)


def _unknown(folder: Path, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return f"{folder} needs code of its own to be built; read that code, then pass --trust-remote-code if you trust it"
    return f"{folder}: transformers does not know this architecture: {text.splitlines()[0]}"


def _reason(error: Exception) -> str:
    """Kind and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _require_decoder(config: PretrainedConfig) -> None:
    causal = {name for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in ([value] if isinstance(value, str) else value)}
    named = getattr(config, "architectures", None) or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise SourceError(f"{Path(config.name_or_path) / 'config.json'} is damaged: architectures is {named!r}, not a list of names")
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(f"{config.model_type} is an encoder-decoder model ({', '.join(named)}); quantkit converts decoder-only language models")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if named and not remote and not any(name in causal for name in named):
        raise SourceError(f"{', '.join(named)} is no causal language model; quantkit converts decoder-only models such as LlamaForCausalLM")
    if not named and not remote and config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(f"model type {config.model_type!r} has no causal language model in transformers")


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outermost = [(path, m) for path, m in lists if not any(path.startswith(f"{other}.") for other, _ in lists if other != path)]
    if not outermost:
        raise SourceError(f"{type(model).__name__} has no list of decoder blocks")
    return max(outermost, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _block(path: str, module: nn.Module, stored: StoredNames) -> Block:
    left_alone: dict[str, str] = {}
    for sub, fused in list(module.named_modules()):
        if is_fused(fused):
            if can_separate(fused) and stored.find(f"{path}.{sub}.0.down_proj.weight") is not None:
                module.set_submodule(sub, separate(fused))
            else:
                left_alone[f"{path}.{sub}"] = f"{type(fused).__name__}, whose matrices are fused in a layout that is not taken apart"
    linears, routers = [], []
    for sub, part in module.named_modules():
        at = f"{path}.{sub}" if sub else path
        if _is_router(sub, module):
            routers.append(at)
        if not isinstance(part, nn.Linear | Conv1D):
            if at not in left_alone:
                left_alone |= _matrices(at, part)
            continue
        linear = _linear(at, part, stored)
        why = _why_not(sub, module, linear, stored)
        if why is None:
            linears.append(linear)
        else:
            left_alone[linear.name] = why
    return Block(path, module, linears, left_alone, routers)


def _matrices(path: str, module: nn.Module) -> dict[str, str]:
    """The matrices of a module that is no Linear: the module where it is nothing else, else each by itself."""
    names = [name for name, p in module.named_parameters(recurse=False) if sum(size > 1 for size in p.shape) > 1]
    why = f"{type(module).__name__}, not a Linear"
    return {path: why} if names and not list(module.children()) else {f"{path}.{name}": f"of a {why}" for name in names}


def _linear(path: str, module: nn.Module, stored: StoredNames) -> Linear:
    name = stored.find(f"{path}.weight") or f"{path}.weight"
    rows, columns = module.weight.shape
    is_conv1d = isinstance(module, Conv1D)
    return Linear(path, name.removesuffix(".weight"), (columns, rows) if is_conv1d else (rows, columns), is_conv1d)


def _why_not(sub: str, block: nn.Module, linear: Linear, stored: StoredNames) -> str | None:
    """Why a Linear of a block must not be quantized, or None."""
    weight = f"{linear.path}.weight"
    if _is_router(sub, block):
        return "router of experts"
    if stored.is_tied(weight):
        return "shared with another block"
    sources = stored.sources(weight)
    if sources and stored.find(weight) is None:
        return f"stored as {', '.join(sources[:3])}"
    return None


def _is_router(sub: str, block: nn.Module) -> bool:
    """A module beside experts that scores them."""
    parent, _, leaf = sub.rpartition(".")
    return leaf in ("gate", "router", "shared_expert_gate") and any(name == "experts" for name, _ in block.get_submodule(parent).named_children())
