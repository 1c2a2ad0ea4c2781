"""Linears that serving engines join into one, and so read with one scheme and ask for under the joint name."""

from __future__ import annotations

from collections.abc import Iterable

FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "w1": "gate_up_proj", "w3": "gate_up_proj",
}  # fmt: skip
"""The joint name in an engine, by the name in a checkpoint."""


def fused_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The layers among these that an engine joins, by the name it gives them; experts, which it joins in other ways, are left out."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if leaf in FUSED and ".experts." not in name:
            groups.setdefault(f"{parent}.{FUSED[leaf]}", []).append(name)
    return {name: members for name, members in groups.items() if len(members) > 1}
