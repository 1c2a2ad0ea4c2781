"""Linears that serving engines join into one, and so read with one scheme and ask for under the joint name."""

from __future__ import annotations

import re
from collections.abc import Iterable

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


def expert_groups(names: Iterable[str]) -> list[list[str]]:
    """The matrices of all experts of a layer, together: an engine runs them as a few tensors, which have one scheme."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            groups.setdefault(match[1], []).append(name)
    return list(groups.values())


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
