"""Linears that serving engines join into one, and so read with one scheme and ask for under the joint name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import takes_group, with_group

FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "w1": "gate_up_proj", "w3": "gate_up_proj",
}  # fmt: skip
"""The joint name in an engine, by the name in a checkpoint."""


_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(.*)")


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The layers among these that an engine joins, by the name it gives them; experts, which it joins in other ways, are left out."""
    groups = _by_joint_name(name for name in names if ".experts." not in name)
    return {name: members for name, members in groups.items() if len(members) > 1}


def experts_with_one_group(schemes: Mapping[str, Scheme], columns: Mapping[str, int]) -> dict[str, tuple[Scheme, str]]:
    """Of layers whose matrices of experts have groups of unlike size: the new schemes of those that can take the smallest, and whose that is.

    An engine runs the experts of a layer as a few tensors, which have one scheme.
    """
    layers: dict[str, list[str]] = {}
    for name in schemes:
        if match := _EXPERT.fullmatch(name):
            layers.setdefault(match[1], []).append(name)
    changed = {}
    for members in layers.values():
        groups = {name: spec.group for name in members if (spec := schemes[name].weight) is not None and takes_group(schemes[name])}
        if len(groups) < len(members) or not all(isinstance(group, int) and group > 0 for group in groups.values()):
            continue
        least = min(members, key=lambda name: groups[name])  # type: ignore[arg-type, return-value]
        taking = (name for name in members if groups[name] != groups[least] and columns[name] % groups[least] == 0)  # type: ignore[operator]
        changed |= {name: (with_group(schemes[name], groups[least]), least) for name in taking}  # type: ignore[arg-type]
    return changed


def joint_name(name: str) -> str:
    """What a layer is called once it is joined with others; its own name where it is not."""
    parent, _, leaf = name.rpartition(".")
    return f"{parent}.{FUSED.get(leaf, leaf)}"


def with_one_range(names: Iterable[str]) -> list[list[str]]:
    """All layers, those together whose weights an engine reads with one scale a tensor: it joins them, an expert's own gate and up among them."""
    return list(_by_joint_name(names).values())


def with_one_input_scale(names: Iterable[str]) -> list[list[str]]:
    """All layers, those together for whose inputs an engine has one scale: what it joins, and the same matrix of every expert of a layer."""
    groups: dict[str, list[str]] = {}
    for joint, members in _by_joint_name(names).items():
        groups.setdefault(_EXPERT.sub(r"\1.\2", joint), []).extend(members)
    return list(groups.values())


def _by_joint_name(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(joint_name(name), []).append(name)
    return groups
