"""What a conversion will do, known from headers alone: every layer's scheme, every output tensor's type and shape, every refusal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint.writer import TensorPlan, planned_bytes
from quantkit.conversion.kv_cache import KVCachePlan, plan_kv_cache
from quantkit.conversion.layer_plan import LayerPlan, check_format, decide_layers
from quantkit.conversion.recipe import Recipe
from quantkit.core.scheme import Scheme
from quantkit.formats.base import Format, is_of_weights, plan_shapes
from quantkit.formats.kv_scales import KV_CACHES, kv_scale_names
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import get_format
from quantkit.formats.stored_layers import stored_shape
from quantkit.models.architecture import Architecture
from quantkit.models.experts import separate_experts


@dataclass(eq=False)
class Plan:
    """Everything a conversion will read and write.

    Attributes:
        layers: quantized linears by checkpoint name, in block order.
        left_alone: matrices that keep their type, embeddings aside, with the reason.
        tensors: every output tensor in the order of the file.
        carried: dense names copied as they are (cast to `dtype` when one is given).
        kv_cache: the scales of a KV cache to be calibrated, or None.
        moved: for every block with a transform, by path, the unquantized tensors of its own, which are written with its layers: a transform may
            be folded into them.
        settings: what the quantization_config says beside the layers' schemes.
        keeps_codes: the source is quantized, and its layers go over as they are, but for those that cannot.
        max_shard_size: bytes of one weight file.
        calibrates_all_experts: every expert sees every calibration token, whoever it is routed to.
    """

    format: Format
    layers: dict[str, LayerPlan]
    left_alone: dict[str, str]
    ignored: list[str]
    tensors: list[TensorPlan]
    carried: list[str]
    bytes_before: int
    max_shard_size: int
    bits_of_layers: int = 0
    weights_of_layers: int = 0
    parameters: int = 0
    notes: list[str] = field(default_factory=list)
    moved: dict[str, list[str]] = field(default_factory=dict)
    kv_cache: KVCachePlan | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    keeps_codes: bool = False
    calibrates_all_experts: bool = False

    @property
    def needs_original(self) -> bool:
        """Whether the original model's states go through the blocks too."""
        return any(layer.rounding.needs_original for layer in self.layers.values())

    @property
    def needs_drift(self) -> bool:
        """Whether what its blocks' linears are given is compared with what the quantized model gives them."""
        return any(layer.rounding.needs_drift for layer in self.layers.values())

    @property
    def roundings(self) -> tuple[str, ...]:
        """Of its layers, with their settings; each once."""
        return tuple(sorted({repr(layer.rounding) for layer in self.layers.values()}))

    @property
    def needs_calibration(self) -> bool:
        if self.kv_cache is not None or self.has_static_inputs:
            return True
        return any(layer.rounding.needs_calibration or layer.transform is not None for layer in self.layers.values())

    @property
    def has_static_inputs(self) -> bool:
        """Whether layers' inputs are quantized by scales that calibration finds."""
        return any(layer.kept is None and layer.scheme.is_static for layer in self.layers.values())

    @property
    def config(self) -> dict[str, Any] | None:
        """The quantization_config of the output; None where nothing in it is quantized."""
        return self.format.config(self.schemes, self.ignored) | self.settings if self.layers or self.settings else None

    @cached_property
    def planned(self) -> dict[str, TensorPlan]:
        """The output tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Every quantized layer's scheme by its name in the checkpoint and, where that is another, in transformers' module tree."""
        by_name = {name: layer.scheme for name, layer in self.layers.items()}
        return by_name | {layer.linear.path: layer.scheme for layer in self.layers.values()}

    @cached_property
    def bytes_after(self) -> int:
        """All weight files, headers included."""
        return planned_bytes(self.tensors, self.max_shard_size)

    @property
    def linear_bpw(self) -> float:
        """All bits stored of the quantized linears' weights (`formats.base.is_of_weights`) over their number."""
        return self.bits_of_layers / max(1, self.weights_of_layers)

    @property
    def file_bpw(self) -> float:
        """All bits of the weight files, headers included, over all parameters."""
        return 8 * self.bytes_after / max(1, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what a dry run tells a program."""
        layers = {
            name: {"shape": list(layer.linear.shape), "scheme": layer.scheme.name, "note": layer.note,
                   "rounding": type(layer.rounding).__name__ if layer.kept is None else None,
                   "transform": type(layer.transform).__name__ if layer.transform is not None else None}
            for name, layer in self.layers.items()
        }
        return {
            "format": self.format.name, "layers": layers, "left_alone": self.left_alone, "needs_calibration": self.needs_calibration,
            "kv_cache": None if self.kv_cache is None else self.kv_cache.name,
            "bytes_before": self.bytes_before, "bytes_after": self.bytes_after, "linear_bpw": self.linear_bpw, "file_bpw": self.file_bpw,
            "notes": self.notes,
        }  # fmt: skip


def make_plan(
    source: OpenedCheckpoint, architecture: Architecture, recipe: Recipe, format_name: str, *, max_shard_size: int, dtype: torch.dtype | None = None,
    allocated: Mapping[str, str] | None = None,
) -> Plan:  # fmt: skip
    """Decide every layer and refuse what cannot be done.

    Args:
        dtype: the type of unquantized tensors in the output; None keeps each as it is.
        allocated: schemes chosen for some layers in place of their rules'.

    Raises:
        RecipeError, FormatError: as `decide_layers` and `check_format`.
    """
    unbuilt = unbuilt_matrices(source, architecture)
    layers, left_alone = decide_layers(architecture, unbuilt, recipe, source, get_format(format_name), allocated or {})
    fmt = get_format(format_name, (layer.scheme for layer in layers.values()), dtype or source.dtype)
    check_format(fmt, layers)
    old_scales = {name for names in kv_scale_names(architecture).values() for name in names if name is not None and name in source}
    plan = lay_out(source, architecture, fmt, layers, left_alone, max_shard_size=max_shard_size, dtype=dtype, left_out=old_scales)
    if recipe.kv_cache_scheme is not None:
        plan.kv_cache = plan_kv_cache(recipe.kv_cache_scheme, architecture, fmt)
        plan.settings["kv_cache_scheme"] = dict(KV_CACHES[plan.kv_cache.name])
        plan.tensors += plan.kv_cache.tensors(fmt.scale_dtype(dtype or source.dtype))
    if old_scales:
        instead = "new ones are calibrated" if plan.kv_cache is not None else "--kv-cache calibrates new ones"
        plan.notes.append(f"the source's {len(old_scales)} scales of its KV cache are left out, as they are of its own layers; {instead}")
    _move(plan, architecture)
    has_experts = any(separate_experts(block.module) for block in architecture.blocks)
    plan.calibrates_all_experts = recipe.moe_calibrate_all_experts and has_experts and plan.needs_calibration
    return plan


def lay_out(
    source: OpenedCheckpoint, architecture: Architecture, fmt: Format, layers: dict[str, LayerPlan], left_alone: dict[str, str], *,
    max_shard_size: int, dtype: torch.dtype | None = None, left_out: Collection[str] = (),
) -> Plan:  # fmt: skip
    """The plan of a conversion whose layers are decided.

    Args:
        dtype: the type of unquantized tensors in the output; None keeps each as it is.
        left_out: stored tensors that the output does not have.
    """
    unbuilt = {name for name in unbuilt_matrices(source, architecture) if f"{name}.weight" in source}
    ignored = (_ignored_linears(architecture, layers) | unbuilt) - layers.keys()
    plan = Plan(fmt, layers, left_alone, sorted(ignored), [], [], source.reader.total_bytes, max_shard_size)
    model_dtype = dtype or source.dtype
    conv1d = {linear.name for block in architecture.blocks for linear in block.linears if linear.is_transposed}
    for name in _in_file_order(source):
        module = name.removesuffix(".weight")
        if name in left_out:
            continue
        if module in layers and name.endswith(".weight"):
            _plan_layer(plan, layers[module], model_dtype)
        else:
            is_decoded = module in source.schemes and name.endswith(".weight")
            info = None if is_decoded else source.reader.info(name)
            kept = info.dtype if info is not None else model_dtype
            shape = tuple(info.shape) if info is not None else stored_shape(source, module)
            if info is None and module in conv1d:
                shape = shape[::-1]
            plan.tensors.append(TensorPlan(name, dtype if dtype is not None and kept.is_floating_point else kept, shape))
            plan.carried.append(name)
            plan.parameters += torch.Size(shape).numel()
    return plan


def _move(plan: Plan, architecture: Architecture) -> None:
    """Take from what is carried the tensors that belong to one block with a transform alone."""
    owners: dict[str, set[str]] = defaultdict(set)
    for path, _ in architecture.model.named_parameters(remove_duplicate=False):
        for name in architecture.stored.sources(path):
            owners[name].add(path)
    for block in architecture.blocks:
        if any(linear.name in plan.layers and plan.layers[linear.name].transform is not None for linear in block.linears):
            own = [f"{block.path}.{name}" for name, _ in block.module.named_parameters()]
            names = {name for path in own if (name := architecture.stored.find(path)) is not None and owners[name] <= set(own)}
            plan.moved[block.path] = [name for name in plan.carried if name in names]
    moved = {name for names in plan.moved.values() for name in names}
    plan.carried = [name for name in plan.carried if name not in moved]


def unbuilt_matrices(source: OpenedCheckpoint, architecture: Architecture) -> dict[str, str]:
    """Matrices of the checkpoint that are in no module of the tree, by name, with the reason to leave them alone."""
    why = "transformers builds no module for it"
    return {name.removesuffix(".weight"): why for name in architecture.unplaced(source.names) if _is_matrix(source, name)}


def _is_matrix(source: OpenedCheckpoint, name: str) -> bool:
    if name.removesuffix(".weight") in source.schemes:
        return True
    info = source.reader.info(name)
    return info.dtype.is_floating_point and sum(size > 1 for size in info.shape) > 1


def _ignored_linears(architecture: Architecture, layers: dict[str, LayerPlan]) -> set[str]:
    """Matrices that a loader would otherwise take for quantized: some make a Linear of what is none here, such as a router.

    By the name in the checkpoint and, where that is another, in transformers' module tree: engines go by the one, transformers by the other.
    """
    quantized = {layer.linear.path for layer in layers.values()}
    alone = {name for block in architecture.blocks for name in block.left_alone}
    names = set()
    for path, module in architecture.model.named_modules():
        if path in alone or (isinstance(module, nn.Linear | Conv1D) and path not in quantized):
            parts = [part for parameter, _ in module.named_parameters(path, recurse=False) for part in architecture.stored.sources(parameter)]
            names |= {path, *(part.removesuffix(".weight") for part in parts if part.endswith(".weight"))}
    return names


def _in_file_order(source: OpenedCheckpoint) -> list[str]:
    """Dense names where their first stored part stands."""
    owner = {part: f"{module}.weight" for module in source.schemes for part in source.parts(module)}
    return list(dict.fromkeys(owner.get(name, name) for name in source.reader.names))


def _plan_layer(plan: Plan, layer: LayerPlan, model_dtype: torch.dtype) -> None:
    rows, columns = layer.linear.shape
    for local, (dtype, shape) in plan_shapes(plan.format, layer.scheme, layer.linear.shape, model_dtype, layer.kept).items():
        tensor = TensorPlan(f"{layer.linear.name}.{local}", dtype, shape)
        plan.tensors.append(tensor)
        plan.bits_of_layers += 8 * tensor.nbytes if is_of_weights(local) else 0
    plan.weights_of_layers += rows * columns
    plan.parameters += rows * columns
