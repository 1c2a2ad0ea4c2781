"""The places of a rotation are found in every family from random weights alone, and where there are none the module in the way is named."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from quantkit.core.hadamard import Hadamard
from quantkit.models.architecture import Architecture, describe
from quantkit.models.rotated import rotate
from quantkit.models.rotation import DoesNotCommute, Fold
from tests.models.test_folding import CONFIG, FAMILIES, GPT, MOE

pytestmark = pytest.mark.filterwarnings("ignore")
LLAMA = {"q_proj": "in", "k_proj": "in", "v_proj": "in heads", "o_proj": "heads out", "gate_proj": "in", "up_proj": "in", "down_proj": "out"}
DELTA = {"in_proj_qkvz": "in", "in_proj_ba": "in", "out_proj": "out", "q_proj": "in", "v_proj": "in", "o_proj": "out"}
PLACES: dict[str, dict[str, str]] = {
    "llama": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "mistral": LLAMA, "gemma": LLAMA, "granite": LLAMA, "smollm3": LLAMA,
    "phi3": {"qkv_proj": "in heads", "o_proj": "heads out", "gate_up_proj": "in", "down_proj": "out"},
    "mixtral": LLAMA | {"gate": "in"}, "qwen2_moe": LLAMA | {"gate": "in", "shared_expert_gate": "in"}, "qwen3_moe": LLAMA | {"gate": "in"},
    "olmoe": LLAMA | {"gate": "in"}, "qwen3_next": DELTA | {"gate": "in", "shared_expert_gate": "in", "down_proj": "out"},
}  # fmt: skip
REFUSED = {
    "gemma2": "what self_attn.o_proj gives is multiplied channel by channel by post_attention_layernorm, a Gemma2RMSNorm,",
    "gemma3_text": "post_attention_layernorm, a Gemma3RMSNorm", "olmo2": "post_attention_layernorm, a Olmo2RMSNorm",
    "glm4": "post_self_attn_layernorm", "cohere": "model.norm is a CohereLayerNorm, which does more than divide by the states' length",
    "gpt2": "transformer.ln_f is a LayerNorm with a bias", "opt": "LayerNorm with a bias", "gpt_neox": "LayerNorm with a bias",
    "gpt_oss": "mlp.experts, a GptOssExperts, adds to the hidden states", "olmo": "the head lm_head does not read",
}  # fmt: skip
MORE = {"olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "qwen3_next": MOE, "gpt_oss": MOE, "gpt2": GPT}


def built(family: str, **settings: Any) -> Architecture:
    known = FAMILIES[family][0] if family in FAMILIES else {}
    config = AutoConfig.for_model(family, **CONFIG | known | MORE.get(family, {}) | settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return describe(config, list(revert_weight_conversion(model, dict(model.named_parameters()))))


def in_words(fold: Fold, width: int) -> str:
    sides = {"in": fold.inputs is not None and fold.inputs.size == width, "heads": bool(fold.value_heads), "out": fold.outputs is not None}
    sides["heads"] |= fold.inputs is not None and fold.inputs.size != width
    return " ".join(side for side, is_there in sides.items() if is_there)


@pytest.mark.parametrize("family", PLACES)
def test_every_matrix_is_turned_on_the_sides_where_it_meets_the_stream(family: str) -> None:
    architecture = built(family)

    rotated = rotate(architecture, seed=0, with_heads=True)

    matrices = {path.removesuffix(".weight"): fold for path, fold in rotated.folds.items() if path.endswith(".weight") and fold.becomes is None}
    assert in_words(matrices.pop(next(path for path in matrices if "embed" in path)), rotated.width) == "in"
    assert in_words(matrices.pop("lm_head"), rotated.width) == "in"
    for path, fold in matrices.items():
        wanted = PLACES[family].get(path.rpartition(".")[2], "in")
        assert in_words(fold, rotated.width) == wanted, path
    linears = {linear.path for block in architecture.blocks for linear in block.linears}
    assert linears <= matrices.keys()
    assert all(parameter.device.type == "meta" for parameter in architecture.model.parameters())


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_in_the_way_of_a_rotation_is_named(family: str) -> None:
    with pytest.raises(DoesNotCommute, match=REFUSED[family]):
        rotate(built(family), seed=0, with_heads=True)


@pytest.mark.parametrize("size", [2, 6, 16])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_are_found_as_large_as_they_are(groups: int, size: int) -> None:
    rotated = rotate(built("llama", num_key_value_heads=groups, head_dim=size), seed=0, with_heads=True)

    assert rotated.heads == dict.fromkeys((f"model.layers.{i}.self_attn.o_proj" for i in range(2)), size)


def test_heads_stay_where_nobody_asks_for_them() -> None:
    rotated = rotate(built("llama"), seed=0, with_heads=False)

    assert not rotated.heads and not any(fold.value_heads for fold in rotated.folds.values())
    assert rotated.folds["model.layers.0.self_attn.o_proj.weight"].inputs is None


def test_a_fold_is_the_product_of_matrices_that_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gain = torch.randn(12, 8, generator=generator), torch.rand(8, generator=generator)
    inputs, heads, outputs = Hadamard(8, 1), Hadamard(2, 2), Hadamard(12, 3)
    fold = Fold(inputs, "norm", 1.0, heads, (4, 12), outputs)

    a, h, b = (rotation.turn(torch.eye(rotation.size)) for rotation in (inputs, heads, outputs))
    middle = torch.block_diag(torch.eye(4), h, h, h, h)
    torch.testing.assert_close(fold.applied(weight, gain), b.T @ middle.T @ weight @ torch.diag(1 + gain) @ a)
    bias = torch.randn(12, generator=generator)
    torch.testing.assert_close(Fold(value_heads=heads, rows=(4, 12), outputs=outputs).applied(bias), bias @ middle @ b)
    torch.testing.assert_close(Fold(inputs, is_transposed=True).applied(weight.T), (weight @ a).T)


def test_a_block_that_clips_what_it_adds_is_refused_by_the_last_proof() -> None:
    """Every place was found: what is tried there is too small to be clipped."""
    architecture = built("llama")
    for block in architecture.blocks:
        mlp = block.module.mlp
        silu, whole = mlp.act_fn, mlp.forward
        mlp.act_fn = Louder(silu)
        mlp.forward = partial(clipped, whole)

    with pytest.raises(DoesNotCommute, match=r"layers\.0: it gives other states than the rotated ones when its weights are rotated"):
        rotate(architecture, seed=0, with_heads=True)


class Louder(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1000 * self.inner(x)


def clipped(whole: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return whole(x).clamp(-5, 5)


def test_a_head_whose_norm_was_not_proved_is_refused_by_the_last_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.models.rotated.norm_folds", lambda *_: {})  # of a LayerNorm, which takes the mean away

    with pytest.raises(DoesNotCommute, match="the head lm_head is given other states than the rotated ones"):
        rotate(built("cohere"), seed=0, with_heads=True)


@pytest.mark.parametrize("when", ["as it is read", "on the way to the first block"])
def test_an_embedding_that_is_scaled_channel_by_channel_is_refused(when: str) -> None:
    architecture = built("llama")
    scale = torch.linspace(0.5, 2, CONFIG["hidden_size"])
    embedding = architecture.model.get_input_embeddings()
    if when == "as it is read":
        embedding.register_forward_hook(lambda module, args, output: output * scale)
    else:
        first = architecture.blocks[0].module
        first.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * scale, *args[1:]), kwargs), with_kwargs=True)

    with pytest.raises(DoesNotCommute, match="does not become the hidden states as it is, but for a number"):
        rotate(architecture, seed=0, with_heads=True)
