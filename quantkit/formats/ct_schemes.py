"""compressed-tensors' config groups and the schemes they stand for; what is not understood is refused by name, never half-read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.core.scheme import CHANNEL, ActivationSpec, QuantSpec, Scheme
from quantkit.core.scheme_names import named
from quantkit.errors import FormatError, RecipeError
from quantkit.formats.config_keys import require_known
from quantkit.formats.ct_layouts import Layout
from quantkit.formats.name_patterns import NamePatterns

_IN_THE_WEIGHTS = {"weight_input", "weight_output"}
"""Places of a transform_config that leave nothing to do at run time."""

_ALSO_CALLED = {"int-quantized": ("naive-quantized", "pack-quantized"), "float-quantized": ("naive-quantized",)}
"""Layouts that hold the same schemes: an older name, and packed words for integers with integer activations."""


def layout_of(scheme: Scheme) -> Layout:
    """How a layer of this scheme is laid out."""
    spec, activation = scheme.weight, scheme.activation
    assert spec is not None
    if spec.kind == "e2m1":
        return "nvfp4-pack-quantized" if spec.scale == "e4m3" else "mxfp4-pack-quantized"
    if spec.kind == "e4m3":
        return "mxfp8-quantized" if spec.scale == "e8m0" else "float-quantized"
    return "int-quantized" if activation is not None and activation.kind == "int" else "pack-quantized"


def group_config(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """The config group of the layers named in `targets`."""
    spec = scheme.weight
    assert spec is not None
    kind = "int" if spec.kind == "int" else "float"
    weights: dict[str, Any] = {"num_bits": spec.bits, "type": kind, "symmetric": spec.symmetric, "dynamic": False} | _strategy(spec)
    if spec.scale in ("e4m3", "e8m0"):
        dtype = "torch.float8_e4m3fn" if spec.scale == "e4m3" else "torch.uint8"
        weights |= {"scale_dtype": dtype} | ({"zp_dtype": dtype} if spec.scale == "e8m0" else {})
    activations = None if scheme.activation is None else _activation_config(scheme.activation)
    return {"targets": targets, "format": layout_of(scheme), "weights": weights, "input_activations": activations, "output_activations": None}


def _strategy(spec: QuantSpec) -> dict[str, Any]:
    if spec.scale == "e4m3":
        return {"strategy": "tensor_group", "group_size": spec.group}
    if isinstance(spec.group, tuple):
        return {"strategy": "block", "block_structure": list(spec.group)}
    if spec.group is None or spec.group == CHANNEL:
        return {"strategy": "tensor" if spec.group is None else "channel"}
    return {"strategy": "group", "group_size": spec.group}


def _activation_config(spec: ActivationSpec) -> dict[str, Any]:
    strategy = {CHANNEL: "token", None: "tensor"}.get(spec.group, "group")
    size = {"group_size": spec.group} if strategy == "group" else {}
    kind = "int" if spec.kind == "int" else "float"
    return {"num_bits": spec.bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": not spec.is_static} | size


class ConfigGroups:
    """The config group of a module: by its exact name, else by a regex, else by class."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._by_target = {target: group for group in reversed(groups) for target in group.get("targets", ())}
        targets = [target for group in groups for target in group.get("targets", ())]
        self._patterns = NamePatterns({target: target[3:] for target in targets if target.startswith("re:")})
        classes = [target for target in targets if not target.startswith("re:") and "." not in target]
        self._of_class = "Linear" if "Linear" in classes or not classes else classes[0]

    def __getitem__(self, module: str) -> dict[str, Any]:
        target = module if module in self._by_target else self._patterns.first(module) or self._of_class
        if target not in self._by_target:
            raise FormatError(f"quantization_config has no group for the quantized layer {module}")
        return self._by_target[target]


def scheme_of(group: Mapping[str, Any], config: Mapping[str, Any]) -> Scheme:
    """The scheme of a config group.

    Raises:
        FormatError: it says something that is not read.
    """
    require_known(group, "compressed-tensors config group")
    if group.get("output_activations") is not None:
        raise FormatError("compressed-tensors with output_activations is not read yet; quantkit reads layers whose outputs are not quantized")
    weights, activations = group["weights"], group.get("input_activations")
    require_known(weights, "compressed-tensors weights")
    if weights.get("dynamic"):
        raise FormatError(f"compressed-tensors with dynamic {weights['dynamic']!r} weights is not read; quantkit reads stored scales")
    try:
        scheme = named(_weight_spec(weights), None if activations is None else _activation_spec(activations))
    except RecipeError as error:
        raise FormatError(f"compressed-tensors {_in_words(weights, activations)} is not read yet: {error}") from error
    layout, wanted = group.get("format") or config.get("format"), layout_of(scheme)
    if {layout, config.get("format") or layout} - {wanted, "mixed-precision", *_ALSO_CALLED.get(wanted, ())}:
        layout = layout if layout != wanted else config["format"]
        raise FormatError(f"compressed-tensors layout {layout!r} with {_in_words(weights, activations)} is not read yet; quantkit reads {wanted}")
    return scheme


def _weight_spec(weights: Mapping[str, Any]) -> QuantSpec:
    bits, kind, symmetric = weights["num_bits"], weights.get("type", "int"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy == "block":
        high, wide = weights["block_structure"]
        group: int | tuple[int, int] | None = (high, wide)
    elif strategy in ("group", "tensor_group"):
        group = weights["group_size"]
    elif strategy in ("channel", "tensor"):
        group = CHANNEL if strategy == "channel" else None
    else:
        raise FormatError(f"compressed-tensors strategy {strategy!r} is not read yet; quantkit reads tensor, channel, group, block and tensor_group")
    if kind == "int":
        return QuantSpec(bits, group, symmetric)
    if (kind, symmetric) != ("float", True) or bits not in (4, 8):
        raise FormatError(f"compressed-tensors with {_in_words(weights, None)} is not read yet; quantkit reads 4- and 8-bit symmetric floats")
    scale = "e4m3" if strategy == "tensor_group" else "e8m0" if group == 32 else "float"
    return QuantSpec(bits, group, kind="e4m3" if bits == 8 else "e2m1", scale=scale)  # type: ignore[arg-type]


def _activation_spec(activations: Mapping[str, Any]) -> ActivationSpec:
    require_known(activations, "compressed-tensors weights")
    kind, dynamic, strategy = activations.get("type", "int"), activations.get("dynamic", False), activations.get("strategy")
    if activations.get("num_bits") != 8 or kind not in ("int", "float") or not activations.get("symmetric", True) or dynamic not in (True, False):
        raise FormatError(
            f"compressed-tensors with activations of {_words(activations)}, dynamic {dynamic} is not read yet; "
            "quantkit reads 8-bit symmetric integers and floats"
        )
    groups = {"token": CHANNEL, "tensor": None, "group": activations.get("group_size")}
    if strategy not in groups:
        raise FormatError(f"compressed-tensors with activations per {strategy} is not read yet; quantkit reads {', '.join(groups)}")
    return ActivationSpec(8, "int" if kind == "int" else "e4m3", groups[strategy], is_static=not dynamic)


def require_no_more(config: Mapping[str, Any]) -> None:
    """Raises FormatError for what changes layers beside their schemes. Transforms of weights are in the stored weights already."""
    require_known(config, "compressed-tensors")
    require_known(config.get("transform_config") or {}, "compressed-tensors transform_config")
    groups = (config.get("transform_config") or {}).get("config_groups") or {}
    online = {str(part.get("location")) for group in groups.values() for part in group.get("apply", ())} - _IN_THE_WEIGHTS
    if online:
        raise FormatError(f"compressed-tensors with transforms at run time ({', '.join(sorted(online))}) is not read yet; convert the original model")
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise FormatError(f"compressed-tensors with the sparsity_config {sparsity!r} is not read yet; quantkit reads dense")


def _in_words(weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> str:
    with_activations = "no activations quantized" if activations is None else f"activations of {_words(activations)}"
    if activations is not None:
        with_activations += f", dynamic {activations.get('dynamic')}"
    return f"{_words(weights)} weights, {with_activations}"


def _words(args: Mapping[str, Any]) -> str:
    symmetry = "symmetric" if args.get("symmetric", True) else "asymmetric"
    return f"{args.get('num_bits')}-bit {symmetry} {args.get('type', 'int')} per {args.get('strategy')}"
