"""Linears divided among ranks: what the ranks compute, put together, is what the whole linear computes."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from quantkit import ops
from quantkit.core.data_free import quantize
from quantkit.core.qtensor import QuantizedTensor
from quantkit.core.scheme import Scheme
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import UsageError
from quantkit.models.architecture import describe
from quantkit.models.sharding import Split, shard, split_of

SCHEMES = ["w4a16-g32", "w4a16-asym-g64", "w3a16-channel", "w8a16-channel", "w2a16"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe"]
INPUTS = ("o_proj", "down_proj")


def quantized(scheme: Scheme) -> QuantizedTensor:
    assert scheme.weight is not None
    return quantize(torch.randn(48, 256, generator=torch.Generator().manual_seed(1)), scheme.weight, torch.float16)


@pytest.mark.parametrize("split", ["outputs", "inputs"])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_the_ranks_compute_makes_the_whole(name: str, split: Split) -> None:
    scheme = parse_scheme(name)
    q, x = quantized(scheme), torch.randn(5, 256, generator=torch.Generator().manual_seed(2))

    parts = [ops.quantized_linear(shard(q, split, rank, 2), scheme, "exact") for rank in range(2)]

    found = torch.cat([part(x) for part in parts], dim=1) if split == "outputs" else sum(p(h) for p, h in zip(parts, x.chunk(2, dim=1), strict=True))
    torch.testing.assert_close(found, ops.quantized_linear(q, scheme, "exact")(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_knows_how_it_is_divided(family: str) -> None:
    sizes = {"num_local_experts": 2} if family == "mixtral" else {"num_experts": 2} if family == "qwen3_moe" else {}
    config = CONFIG_MAPPING[family](
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=33000, **sizes
    )
    architecture = describe(config, [])

    splits = {linear.path: split_of(config, linear.path) for block in architecture.blocks for linear in block.linears}

    assert splits
    for path, split in splits.items():
        assert split == ("inputs" if path.endswith(INPUTS) else "outputs"), path


def test_experts_kept_one_by_one_are_divided_as_they_are_fused() -> None:
    config = CONFIG_MAPPING["mixtral"]()

    assert split_of(config, "model.layers.3.mlp.experts.7.up_proj") == "outputs"
    assert split_of(config, "model.layers.3.mlp.experts.7.down_proj") == "inputs"
    assert split_of(config, "model.layers.3.mlp.gate") is None


def test_what_cannot_be_divided_is_refused_in_words() -> None:
    q = quantized(parse_scheme("w4a16-g32"))
    with pytest.raises(UsageError, match="48 outputs of a linear cannot be divided among 5 ranks"):
        shard(q, "outputs", 0, 5)
    with pytest.raises(UsageError, match="columns 0 to 16 cut a group of 32"):
        shard(q, "inputs", 0, 16)
    scattered = QuantizedTensor(q.spec, q.codes, q.scale, None, torch.arange(256).flip(0) // 32)
    with pytest.raises(UsageError, match="act-order"):
        shard(scattered, "inputs", 0, 2)
