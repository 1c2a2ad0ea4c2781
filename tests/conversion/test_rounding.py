"""Which rounding a layer gets by how much calibration saw of its input."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from quantkit.conversion.report import LayerResult
from quantkit.conversion.rounding import round_together
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import CalibrationError, SourceError
from quantkit.methods.base import Statistics
from quantkit.methods.gptq import GPTQ
from quantkit.methods.rtn import SearchedScales
from tests.methods.test_gptq import correlated, weights

INPUTS = 256


def rounded(
    tokens: int, *, weight: Tensor | None = None, hessian: Tensor | None = None, widest: torch.dtype = torch.float16
) -> tuple[QuantizedTensor, LayerResult]:
    """A layer by GPTQ with so many tokens seen, in a container whose scales are half, or of this type for a bfloat16 model."""
    layer = SimpleNamespace(linear=SimpleNamespace(name="up", is_transposed=False), scheme=parse_scheme("w4a16-g64"), rounding=GPTQ(), note=None)
    fmt = SimpleNamespace(scale_dtype=lambda dtype: widest if dtype == torch.bfloat16 else torch.float16)
    plan = SimpleNamespace(layers={"up": layer}, format=fmt, needs_calibration=True)
    statistics = Statistics(correlated(INPUTS, tokens=tokens) if hessian is None else hessian, tokens)
    stored = {"up.weight": weights(16, INPUTS) if weight is None else weight}
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


def test_inputs_that_overflow_are_blamed_on_the_layer_that_reads_them() -> None:
    with pytest.raises(CalibrationError, match=r"^up: the squares of its inputs overflow on calibration data; most likely a weight before it"):
        rounded(1000, hessian=correlated(INPUTS, tokens=1000).fill_diagonal_(torch.inf))


@pytest.mark.parametrize(("scales", "way"), [(torch.bfloat16, r", or use --dtype bfloat16$"), (torch.float16, r"--ignore 'up\$'$")], ids=str)
def test_weights_whose_scales_overflow_are_refused_with_a_way_out(scales: torch.dtype, way: str) -> None:
    weight = weights(16, INPUTS)
    weight[3, 5] = 1e7

    with pytest.raises(SourceError, match=rf"up.weight holds values up to 1e\+07, whose scales float16 cannot hold; leave it .*{way}"):
        rounded(1000, weight=weight, widest=scales)
    rounded(1000, weight=weight / 1e3)
