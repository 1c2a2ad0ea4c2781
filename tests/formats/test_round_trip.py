"""For every format and every scheme it holds, decode(encode(q)) is q bit for bit."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTQConfig

from quantkit import __version__
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scales import nest
from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import parse_scheme
from quantkit.formats.base import plan_shapes
from quantkit.formats.registry import FORMATS, format_of

SHAPES = [(64, 128), (96, 172), (1, 64), (63, 192), (256, 384)]
INTEGERS = [f"w{bits}a16{sym}{group}" for bits in (2, 3, 4, 5, 6, 8) for sym in ("", "-asym") for group in ("", "-g32", "-channel")]
TABLES = [f"{kind}{block}{dq}" for kind in ("nf4", "fp4") for block in ("", "-b32", "-b4096") for dq in ("", "-dq")]
FLOATS = ["fp8-dynamic", "fp8-tensor", "fp8-static", "fp8-channel-static", "fp8-block", "fp8-a16", "nvfp4", "mxfp4", "mxfp8"]
SCHEMES = [*INTEGERS, "w8a8-int8", "w4a8", "w4a8-asym-g32", "w4afp8", *FLOATS, *TABLES, "int8"]


def random_quantized(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, lowest_zero: int = 0) -> QuantizedTensor:
    """Random codes in a tensor of the stored types."""
    spec, generator = scheme.weight, torch.Generator().manual_seed(shape[1])
    codes = torch.randint(0, spec.max_code + 1, shape, generator=generator, dtype=torch.uint8)
    per_group = spec.scale_shape(*shape)
    zero = None if spec.symmetric else torch.randint(lowest_zero, spec.max_code + 1, per_group, generator=generator, dtype=torch.int16)
    scale = torch.rand(per_group, generator=generator) + 0.01
    nested = None
    if spec.scale == "nested":
        scale, nested = nest(scale)
    else:
        scale = scale.to({"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu, "row maximum": torch.float32}.get(spec.scale, dtype))
    static = scheme.activation is not None and scheme.activation.is_static
    return QuantizedTensor(
        spec, codes, scale, zero, nested=nested, divisor=torch.tensor([37.0]) if spec.scale == "e4m3" else None,
        input_scale=torch.tensor([0.5], dtype=dtype) if static else None,
    )  # fmt: skip


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
    fmt, main = FORMATS[name], parse_scheme(scheme)
    other = parse_scheme("w8a16-channel") if fmt.holds_mixed else main
    layers = {"model.layers.0.a": main, "model.layers.1.a": other, "model.layers.10.a": main}
    config = fmt.config(layers, ignored=["lm_head"])
    stored = {
        f"{layer}.{part}": tensor
        for layer, s in layers.items()
        for part, tensor in fmt.encode(random_quantized(s, shape, fmt.scale_dtype(torch.float16)), s).items()
    }

    assert format_of(config).read_config(config, stored, stored.__getitem__) == layers


def test_every_format_holds_something() -> None:
    assert {name for name, _, _ in CASES} == set(FORMATS)


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
def test_a_gptq_configuration_claims_only_what_was_done_and_transformers_takes_it(name: str) -> None:
    config = FORMATS[name].config({"a": parse_scheme("w4a16")}, [])

    assert config["meta"] == {"quantizer": [f"quantkit:{__version__}"]} and config["true_sequential"] is False
    GPTQConfig.from_dict(config)
