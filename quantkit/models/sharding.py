"""How the linears of a model are divided among ranks: by outputs, so that each rank holds some heads or features, or by inputs, so that ranks add up.

transformers' configs say it for every family that it can run so; experts that are kept one by one are divided as they are fused. A family's plan
also says where every rank wants the whole output ("gather") or cuts its input itself ("split"), which is for the ranks' code to do.
"""

from __future__ import annotations

import re
from typing import Literal

from transformers import PretrainedConfig

from quantkit.core.qtensor import QuantizedTensor
from quantkit.errors import UsageError

Split = Literal["outputs", "inputs"]
_KINDS: dict[str, Split] = {
    "colwise": "outputs", "colwise_gather_output": "outputs", "packed_colwise": "outputs", "rowwise": "inputs", "rowwise_split_input": "inputs",
}  # fmt: skip
_EXPERT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj)$")


def split_of(config: PretrainedConfig, path: str) -> Split | None:
    """How the linear at this path of the module tree is divided; None where every rank holds it whole."""
    plan = getattr(config.get_text_config(), "base_model_tp_plan", None) or {}
    path = _EXPERT.sub(lambda found: f".experts.{'down_proj' if found[1] == 'down_proj' else 'gate_up_proj'}", path)
    at = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    kind = next((kind for pattern, kind in plan.items() if at == pattern or at.endswith(f".{pattern}")), None)
    return _KINDS.get(kind) if kind else None


def shard(q: QuantizedTensor, split: Split, rank: int, size: int) -> QuantizedTensor:
    """The part of a weight [N, K] that one of `size` ranks holds: [N / size, K] or [N, K / size].

    Raises:
        UsageError: the weight, or its groups along K, cannot be divided so.
    """
    total = q.shape[0] if split == "outputs" else q.shape[1]
    if total % size:
        raise UsageError(f"{total} {split} of a linear cannot be divided among {size} ranks; take a number that divides them")
    start, stop = rank * total // size, (rank + 1) * total // size
    return q.rows(start, stop) if split == "outputs" else q.columns(start, stop)
