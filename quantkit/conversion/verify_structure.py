"""Is everything there, of the right shape, and does the configuration say what is stored? Functions that list problems; headers only."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from transformers.pytorch_utils import Conv1D

from quantkit.errors import QuantkitError
from quantkit.formats.fusion import fused_groups
from quantkit.formats.kv_scales import kv_scheme
from quantkit.formats.name_patterns import NamePatterns, Targets
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.stored_layers import stored_shape
from quantkit.models.architecture import Architecture


def missing_parameters(opened: OpenedCheckpoint, architecture: Architecture) -> list[str]:
    """Parameters of the model that the checkpoint lacks, or holds in another shape."""
    problems = []
    for path, parameter in architecture.model.named_parameters():
        found = architecture.stored.find(path)
        if found is None:
            if not architecture.stored.sources(architecture.stored.owner(path)):
                problems.append(f"no tensor for {path} {list(parameter.shape)}")
            continue
        shape, wanted = _shape(opened, found), tuple(parameter.shape)
        owner = architecture.model.get_submodule(path.rpartition(".")[0])
        if shape is not None and shape != wanted and not (isinstance(owner, Conv1D) and shape == wanted[::-1]):
            problems.append(f"{found} is {list(shape)}; the model wants {list(wanted)}")
    return problems


def config_problems(opened: OpenedCheckpoint, architecture: Architecture) -> list[str]:
    """Where the quantization_config and the tensors contradict each other."""
    config = opened.reader.quantization_config
    if opened.format is None or config is None:
        return []
    if not opened.schemes:
        return [] if kv_scheme(opened.reader.quantization_config) is not None else ["the config says the model is quantized, and no layer is"]
    check = {"compressed-tensors": _compressed_tensors_problems, "gptq": _gptq_problems}.get(config["quant_method"], _skip_list_problems)
    return list(check(config, opened, architecture))


def _compressed_tensors_problems(config: Mapping[str, Any], opened: OpenedCheckpoint, architecture: Architecture) -> Iterator[str]:
    targets = Targets(target for group in config["config_groups"].values() for target in group.get("targets", ()))
    ignored = Targets(config.get("ignore") or ())
    linears = _linear_names(architecture)
    for target in targets.idle(opened.schemes.keys() | _other_names(architecture, opened.schemes)):
        yield f"config_groups targets {target!r}, and no quantized layer has that name"
    for entry in ignored.idle(_module_names(opened, architecture)):
        yield f"ignore lists {entry!r}, and the model has no such layer"
    for name in sorted(linears - opened.schemes.keys()):
        if name in targets and name not in ignored:
            yield f"{name} is not quantized, and neither is it in ignore: engines would look for its codes"
    for name in sorted(opened.schemes.keys()):
        if name in ignored:
            yield f"{name} is quantized, and it is in ignore: engines would look for its weight"


def _gptq_problems(config: Mapping[str, Any], opened: OpenedCheckpoint, architecture: Architecture) -> Iterator[str]:
    for key in ("bits", "group_size", "desc_act", "sym"):
        if key not in config:
            yield f"the config lacks {key!r}"
    path = opened.reader.folder / "quantize_config.json"
    if path.is_file():
        own = json.loads(path.read_bytes())
        unlike = [key for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic") if own.get(key) != config.get(key)]
        if unlike:
            yield f"quantize_config.json and config.json differ in {', '.join(unlike)}"
    if bool(config.get("lm_head")) != ("lm_head" in opened.schemes):
        yield f"lm_head is {'' if 'lm_head' in opened.schemes else 'not '}quantized, and lm_head in the config says otherwise"
    linears = _linear_names(architecture)
    dynamic = config.get("dynamic") or {}
    skipped = NamePatterns({entry: entry[2:] for entry in dynamic if entry.startswith("-:")})
    changed = NamePatterns({entry: entry.removeprefix("+:") for entry in dynamic if not entry.startswith("-:")})
    known = _module_names(opened, architecture) | _other_names(architecture, linears) | fused_groups(linears).keys()
    for entry in skipped.idle(known) + changed.idle(known):
        yield f"dynamic has {entry!r}, which matches no layer"
    outside = {linear.name for linear in architecture.outside}
    for name in sorted(linears - opened.schemes.keys() - outside):
        if skipped.first(name) is None:
            yield f"{name} is not quantized, and dynamic does not skip it: engines would look for its codes"


def _skip_list_problems(config: Mapping[str, Any], opened: OpenedCheckpoint, architecture: Architecture) -> Iterator[str]:
    """AWQ, fp8 and bitsandbytes name what is not quantized, whole or by a part of its path; where they name nothing, engines go by the tensors."""
    key = "llm_int8_skip_modules" if config["quant_method"] == "bitsandbytes" else "modules_to_not_convert"
    entries = config.get(key)
    if not entries:
        return

    known = _module_names(opened, architecture)

    def is_listed(name: str) -> bool:
        return any(f".{entry}." in f".{name}." for entry in entries)

    for entry in entries:
        if not any(f".{entry}." in f".{name}." for name in known):
            yield f"{key} lists {entry!r}, and the model has no such layer"
    for name in sorted(_linear_names(architecture) - opened.schemes.keys()):
        if not is_listed(name):
            yield f"{name} is not quantized, and {key} does not list it: engines would look for its codes"
    for name in sorted(opened.schemes.keys()):
        if is_listed(name):
            yield f"{name} is quantized, and {key} lists it: engines would look for its weight"


def _module_names(opened: OpenedCheckpoint, architecture: Architecture) -> set[str]:
    """Whatever a configuration may name: modules of the tree, linears as the checkpoint calls them, and owners of tensors stored as they are."""
    owners = {name.rpartition(".")[0] for name in opened.dense_names}
    return {name for name, _ in architecture.model.named_modules()} | _linear_names(architecture) | owners


def _linear_names(architecture: Architecture) -> set[str]:
    return {linear.name for block in architecture.blocks for linear in block.linears} | {linear.name for linear in architecture.outside}


def _other_names(architecture: Architecture, layers: Collection[str]) -> set[str]:
    """What transformers' module tree calls these layers."""
    every = [linear for block in architecture.blocks for linear in block.linears] + architecture.outside
    return {linear.path for linear in every if linear.name in layers}


def _shape(opened: OpenedCheckpoint, name: str) -> tuple[int, ...] | None:
    """The dense shape of a tensor; None where it cannot be told, which another check reports."""
    module = name.removesuffix(".weight")
    if module not in opened.schemes:
        return opened.reader.info(name).shape
    try:
        return stored_shape(opened, module)
    except QuantkitError:
        return None
