"""Which rounding a layer gets by how much calibration saw of its input."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from quantkit.conversion.report import LayerResult
from quantkit.conversion.rounding import round_together
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import parse_scheme
from quantkit.methods.base import Statistics
from quantkit.methods.gptq import GPTQ
from quantkit.methods.rtn import SearchedScales
from tests.methods.test_gptq import correlated, weights

INPUTS = 256


def rounded(tokens: int) -> tuple[QuantizedTensor, LayerResult]:
    """A layer by GPTQ with so many tokens seen."""
    layer = SimpleNamespace(linear=SimpleNamespace(name="up", is_transposed=False), scheme=parse_scheme("w4a16-g64"), rounding=GPTQ(), note=None)
    plan = SimpleNamespace(layers={"up": layer}, format=SimpleNamespace(scale_dtype=lambda dtype: torch.float16))
    statistics = Statistics(correlated(INPUTS, tokens=tokens), tokens)
    stored = {"up.weight": weights(16, INPUTS)}
    ((_, q, result),) = round_together(["up"], plan, stored, statistics, torch.float16, torch.device("cpu"))
    return q, result


@pytest.mark.parametrize("tokens", [INPUTS // 2, 4 * INPUTS])
def test_gptq_gets_what_saw_half_as_many_tokens_as_inputs(tokens: int) -> None:
    _, result = rounded(tokens)

    assert (result.rounding, result.seen_tokens, result.note) == ("GPTQ", tokens, None)


@pytest.mark.parametrize("tokens", [32, INPUTS // 2 - 1])
def test_with_fewer_the_scales_are_searched_under_what_was_seen(tokens: int) -> None:
    q, result = rounded(tokens)

    assert (result.rounding, result.seen_tokens) == ("SearchedScales", tokens)
    assert f"only {tokens} calibration tokens reached its {INPUTS} inputs" in result.note
    seen = Statistics(correlated(INPUTS, tokens=tokens), tokens)
    assert q.equals(SearchedScales()(weights(16, INPUTS), q.spec, torch.float16, seen))


def test_almost_none_are_as_good_as_none() -> None:
    q, result = rounded(31)

    assert (result.rounding, result.seen_tokens) == ("SearchedScales", None)
    assert "too few calibration tokens" in result.note
    assert q.equals(SearchedScales()(weights(16, INPUTS), q.spec, torch.float16, None))
