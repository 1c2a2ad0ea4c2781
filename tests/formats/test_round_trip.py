"""For every format and every scheme it holds, decode(encode(q)) is q bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTQConfig

from quantkit import __version__
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import parse_scheme
from quantkit.formats.base import plan_shapes
from quantkit.formats.registry import FORMATS, format_of

SHAPES = [(64, 128), (96, 172), (1, 64), (63, 192)]
SCHEMES = [f"w{bits}a16{sym}{group}" for bits in (2, 3, 4, 5, 6, 8) for sym in ("", "-asym") for group in ("", "-g32", "-channel")] + ["w8a8-int8"]


def random_quantized(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, lowest_zero: int = 0) -> QuantizedTensor:
    spec, generator = scheme.weight, torch.Generator().manual_seed(shape[1])
    codes = torch.randint(0, spec.max_code + 1, shape, generator=generator, dtype=torch.uint8)
    per_group = (shape[0], spec.num_groups(shape[1]))
    scale = torch.rand(per_group, generator=generator).to(dtype)
    zero = None if spec.symmetric else torch.randint(lowest_zero, spec.max_code + 1, per_group, generator=generator, dtype=torch.int16)
    return QuantizedTensor(spec, codes, scale, zero)


CASES = [(f, s, shape) for f in FORMATS for s in SCHEMES for shape in SHAPES if FORMATS[f].why_not(parse_scheme(s), shape) is None]


@pytest.mark.parametrize(("name", "scheme", "shape"), CASES, ids=lambda v: str(v))
def test_decode_of_encode_is_the_same_tensor(name: str, scheme: str, shape: tuple[int, int]) -> None:
    fmt, scheme = FORMATS[name], parse_scheme(scheme)
    q = random_quantized(scheme, shape, fmt.scale_dtype(torch.bfloat16))

    parts = fmt.encode(q, scheme)

    assert fmt.decode(parts, scheme).equals(q)
    planned = plan_shapes(fmt, scheme, shape, torch.bfloat16)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in parts.items()} == planned


@pytest.mark.parametrize(("name", "scheme", "shape"), CASES, ids=lambda v: str(v))
def test_configuration_alone_brings_the_scheme_back(name: str, scheme: str, shape: tuple[int, int]) -> None:
    fmt, main, other = FORMATS[name], parse_scheme(scheme), parse_scheme("w8a16-channel")
    layers = {"model.layers.0.a": main, "model.layers.1.a": other, "model.layers.10.a": main}
    config = fmt.config(layers, ignored=["lm_head"])
    names = [f"{layer}.{part}" for layer, s in layers.items() for part in plan_shapes(fmt, s, shape, torch.float16)]

    assert format_of(config).read_config(config, names) == layers


def test_every_format_holds_something() -> None:
    assert {name for name, _, _ in CASES} == set(FORMATS)


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
def test_a_gptq_configuration_claims_only_what_was_done_and_transformers_takes_it(name: str) -> None:
    config = FORMATS[name].config({"a": parse_scheme("w4a16")}, [])

    assert config["meta"] == {"quantizer": [f"quantkit:{__version__}"]} and config["true_sequential"] is False
    GPTQConfig.from_dict(config)
