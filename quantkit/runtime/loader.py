"""A checkpoint of any container to a model that runs: tensor by tensor, each repacked for its kernel as it comes.

The model is transformers' own, built without weights; its linears are replaced, everything else takes its values. At no time is more than one
dense weight in memory beside what is kept. An unquantized model may be quantized as it comes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from quantkit import ops
from quantkit.allocator import give_back
from quantkit.checkpoint.source import resolve
from quantkit.checkpoint.weight_files import some
from quantkit.core.scheme import Scheme
from quantkit.errors import SourceError
from quantkit.formats.fusion import experts_with_one_group
from quantkit.formats.kv_scales import KVScales, read_kv_scales
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.streamed import FileOrder
from quantkit.models.architecture import Architecture, Linear, describe, load_config
from quantkit.runtime.attention import ATTENTION
from quantkit.runtime.linear import PackedLinear
from quantkit.runtime.quantization import quantize, require_unquantized, scheme_at_load

_log = logging.getLogger("quantkit")


@dataclass(eq=False, slots=True)
class LoadedModel:
    """Ready to run.

    Attributes:
        dtype: the type of the checkpoint's unquantized values.
        schemes: how its quantized layers are stored, by checkpoint name.
        context: the longest sequence it was made for.
        kv_scales: what the checkpoint says of its KV cache.
    """

    name: str
    folder: Path
    model: nn.Module
    config: PretrainedConfig
    dtype: torch.dtype
    schemes: dict[str, Scheme]
    context: int
    device: torch.device
    kv_scales: KVScales = field(default_factory=KVScales)

    @property
    def vocabulary(self) -> int:
        """Ids of tokens go from 0 to one less."""
        return int(self.config.get_text_config().vocab_size)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Where the model's weights come from and how they are to be held.

    Attributes:
        kept: dense weights in the order in which an unquantized file keeps them.
        at_load: the schemes of the linears that are quantized as they come, by module path.
    """

    architecture: Architecture
    opened: OpenedCheckpoint
    kept: FileOrder
    at_load: dict[str, Scheme]
    mode: ops.Mode
    device: torch.device


def load(
    source: str, *, mode: ops.Mode = "fast", device: torch.device, quantization: str | None = None, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a folder, hub id, `modelscope:org/name` or `reference`.

    Args:
        quantization: a name of `quantization.AT_LOAD`: the linears of an unquantized model's blocks are quantized as they come, from their
            weights alone; its head, routers and embeddings are not.

    Raises:
        SourceError, CheckpointError, FormatError: it is not there, not whole, of an unknown architecture or container, or cannot be paged.
        UsageError: it is quantized already, or this machine has no kernel for the mode.
    """
    ops.require_mode(mode, device)
    origin = resolve(source, trust_remote_code=trust_remote_code)
    opened = OpenedCheckpoint.of(origin)
    if quantization is not None:
        require_unquantized(opened, origin.name, quantization)
    config = load_config(origin.folder, trust_remote_code=trust_remote_code)
    _require_pageable(config, origin.name)
    architecture = describe(config, opened, trust_remote_code=trust_remote_code)
    linears = [linear for block in architecture.blocks for linear in block.linears] if quantization is not None else []
    at_load = {linear.path: scheme_at_load(quantization, linear.shape) for linear in linears if quantization is not None}
    at_load |= _joined(linears, at_load)
    schemes = opened.schemes | {linear.name: at_load[linear.path] for linear in linears}
    kv_scales = read_kv_scales(opened, architecture)
    unread = architecture.unplaced(opened.names)
    if unread:
        what = f"stores {len(unread)} tensors that its config's {config.model_type} has no place for"
        _log.warning("%s %s, which are not loaded: %s", origin.name, what, some(unread))
    _fill(_Weights(architecture, opened, FileOrder(opened, architecture), at_load, mode, device))
    model = architecture.model
    model.set_attn_implementation(ATTENTION)
    return LoadedModel(origin.name, origin.folder, model, config, opened.dtype, schemes, architecture.context, device, kv_scales)


def _joined(linears: list[Linear], at_load: dict[str, Scheme]) -> dict[str, Scheme]:
    """Experts of a layer in groups of one size, as a conversion stores them."""
    schemes, paths = {linear.name: at_load[linear.path] for linear in linears}, {linear.name: linear.path for linear in linears}
    changed = experts_with_one_group(schemes, {linear.name: linear.shape[1] for linear in linears})
    return {paths[name]: scheme for name, (scheme, _) in changed.items()}


def _require_pageable(config: PretrainedConfig, name: str) -> None:
    text = config.get_text_config()
    others = sorted({kind for kind in getattr(text, "layer_types", None) or [] if kind not in ("full_attention", "sliding_attention")})
    if others or getattr(text, "attention_chunk_size", None):
        kinds = ", ".join(others) or "chunked attention"
        raise SourceError(f"{name} is a {config.model_type} with layers of {kinds}; the runtime runs full and sliding attention")


def _fill(weights: _Weights) -> None:
    architecture, opened, mode, device = weights.architecture, weights.opened, weights.mode, weights.device
    model, stored = architecture.model, architecture.stored
    embedding = model.get_input_embeddings()
    routers = {path for block in architecture.blocks for path in block.routers}
    tied = []
    for path, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D):  # a class derived from them may do more than multiply
            if stored.owner(f"{path}.weight") != f"{path}.weight":
                tied.append(path)
            else:
                own_mode: ops.Mode = "exact" if path in routers else mode  # a router in 16 bits would choose other experts
                model.set_submodule(path, _packed(path, module, weights, own_mode))
                give_back()
            continue
        if path in routers and mode == "exact" and device.type == "cpu":
            module.forward = ops.in_tiles(module.forward)
        dtype = opened.dtype if module is embedding and mode != "exact" else torch.float32
        for name, parameter in [*module.named_parameters(path, recurse=False), *_persistent_buffers(path, module)]:
            if parameter.device.type == "meta" or stored.sources(name):
                value = _read(name, tuple(parameter.shape), weights)
                set_module_tensor_to_device(model, name, device, value=value, dtype=dtype if parameter.is_floating_point() else parameter.dtype)
    for path in tied:
        weight = model.get_parameter(stored.owner(f"{path}.weight")).data
        bias = _bias(path, model.get_submodule(path), weights)
        model.set_submodule(path, PackedLinear(ops.dense_linear(weight, mode), bias, tuple(weight.shape)))
    model.to(device)
    embedding.register_forward_hook(lambda module, inputs, output: output.float())


def _bias(path: str, module: nn.Module, weights: _Weights) -> Tensor | None:
    has_bias = getattr(module, "bias", None) is not None
    return _read(f"{path}.bias", tuple(module.bias.shape), weights).float().to(weights.device) if has_bias else None


def _packed(path: str, module: nn.Module, weights: _Weights, mode: ops.Mode) -> PackedLinear:
    rows, columns = module.weight.shape
    shape = (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
    bias = _bias(path, module, weights)
    name = weights.architecture.stored.find(f"{path}.weight")
    scheme = weights.opened.schemes.get(name.removesuffix(".weight")) if name else None
    if scheme is not None and name is not None:
        q = weights.opened.quantized(name.removesuffix(".weight"))
        _require_shape(name, q.shape, shape)
        return PackedLinear(ops.quantized_linear(q.to(weights.device), scheme, mode), bias, shape)
    weight = _read(f"{path}.weight", (rows, columns), weights)
    weight = (weight.T.contiguous() if isinstance(module, Conv1D) else weight).to(weights.device)
    scheme = weights.at_load.get(path)
    if scheme is not None:
        return PackedLinear(ops.quantized_linear(quantize(weight, scheme, weights.opened.dtype), scheme, mode), bias, shape)
    return PackedLinear(ops.dense_linear(weight, mode), bias, shape)


def _read(parameter: str, shape: tuple[int, ...], weights: _Weights) -> Tensor:
    stored = weights.architecture.stored
    sources = stored.sources(parameter)
    if not sources:
        raise SourceError(f"the checkpoint has no tensor for {parameter} {list(shape)}")
    value = stored.read(parameter, weights.kept.get)
    _require_shape(sources[0], tuple(value.shape), shape)
    return value


def _require_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise SourceError(f"{name} is {list(found)} in the checkpoint; the config's model wants {list(wanted)}")


def _persistent_buffers(path: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    persistent = module.state_dict().keys()
    return [(f"{path}.{name}" if path else name, b) for name, b in module.named_buffers(recurse=False) if name in persistent]
