"""Scales go where families keep their norms and linears, a block with scales folded computes what it did, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.models.architecture import Block, describe, load_config
from quantkit.models.folding import Found, changes, find_sites
from quantkit.models.streaming import BlockRunner

WIDTH = 64
CONFIG: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
       "decoder_sparse_step": 1}  # fmt: skip
GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 128, "vocab_size": 96}
LLAMA = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm", "o_proj": "v_proj",
         "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm", "down_proj": "up_proj"}  # fmt: skip
GEMMA = LLAMA | {"gate_proj": "pre_feedforward_layernorm", "up_proj": "pre_feedforward_layernorm"}
FUSED = {"qkv_proj": "input_layernorm", "o_proj": "qkv_proj", "gate_up_proj": "post_attention_layernorm", "down_proj": "gate_up_proj"}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, str | None]]] = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, LLAMA), "qwen2": ({}, LLAMA), "qwen3": ({}, LLAMA), "mistral": ({}, LLAMA),
    "gemma": ({}, LLAMA), "gemma2": ({}, GEMMA), "gemma3_text": ({}, GEMMA), "phi3": ({}, FUSED),
    "glm4": ({}, LLAMA | {"gate_up_proj": "post_attention_layernorm", "down_proj": "gate_up_proj"}),
    "mixtral": (MOE, LLAMA), "qwen2_moe": (MOE, LLAMA), "qwen3_moe": (MOE, LLAMA),
    "cohere": ({}, LLAMA | {"gate_proj": "input_layernorm", "up_proj": "input_layernorm"}),
    "gpt2": (GPT, {"c_attn": "ln_1", "attn.c_proj": "c_attn", "c_fc": "ln_2", "mlp.c_proj": None}),
    "gpt_neox": ({}, {"query_key_value": "input_layernorm", "dense_h_to_4h": "post_attention_layernorm", "dense": None, "dense_4h_to_h": None}),
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": WIDTH},
            {"q_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc1": "final_layer_norm", "fc2": "fc1"}),
    "olmo2": ({}, LLAMA | dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))),
}  # fmt: skip


class Opened:
    """The first block of a random model, loaded, with a pass over a few tokens."""

    def __init__(self, family: str, folder: Path, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIG | settings), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        model.save_pretrained(folder)
        reader = CheckpointReader(folder)
        architecture = describe(load_config(folder), reader)
        self.runner = BlockRunner(architecture)
        self.ids, self.positions = torch.randint(3, 96, (1, 40)), torch.arange(40)[None]
        self.runner.load_outside(reader)
        self.hidden = self.runner.embed(self.ids, self.positions)
        self.runner.settle(self.hidden, self.ids, self.positions)
        self.block: Block = architecture.blocks[0]
        self.runner.load(self.block.path, reader)
        self.linears = [linear.path.removeprefix(f"{self.block.path}.") for linear in self.block.linears]

    def run(self) -> Tensor:
        return self.runner.block(0, self.hidden, self.ids, self.positions)

    def find(self, **more: Any) -> Found:
        return find_sites(self.block.module, self.linears, self.run, **more)


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    return Opened(request.param, tmp_path, FAMILIES[request.param][0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opened", FAMILIES, indirect=True)
def test_every_linear_is_served_from_where_its_family_allows(opened: Opened, request: pytest.FixtureRequest) -> None:
    places = FAMILIES[request.node.callspec.params["opened"]][1]

    found = opened.find()

    sources = {reader: site.source.rpartition(".")[2] for site in found.sites for reader in site.readers}
    assert {*sources, *found.why_not} >= set(opened.linears)
    for name in opened.linears:
        wanted = [place for end, place in places.items() if f".{name}".endswith(f".{end}")]
        assert not wanted or sources.get(name) == wanted[0], name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opened", FAMILIES, indirect=True)
def test_a_block_computes_the_same_with_any_scales_folded(opened: Opened) -> None:
    before, found = opened.run(), opened.find()

    for site in found.sites:
        for change in changes(opened.block.module, site, torch.rand(site.num_scales) * 3 + 0.2):
            parameter = opened.block.module.get_parameter(change.parameter)
            assert not torch.equal(change.applied(parameter.data), parameter.data)
            parameter.data = change.applied(parameter.data)

    torch.testing.assert_close(opened.run(), before, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_looking_leaves_the_weights_as_they_were(opened: Opened) -> None:
    before = {name: parameter.data.clone() for name, parameter in opened.block.module.named_parameters()}

    opened.find()

    assert all(torch.equal(parameter.data, before[name]) for name, parameter in opened.block.module.named_parameters())


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_parameter_that_must_stay_rules_out_what_would_change_it(opened: Opened) -> None:
    found = opened.find(fixed=lambda parameter: "it is shared" if parameter == "self_attn.v_proj.weight" else None)

    assert found.why_not == dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), "it is shared")
    assert [site.source for site in found.sites] == ["post_attention_layernorm", "mlp.up_proj"]


class Leaking(nn.Module):
    """A norm whose output goes to a linear and, besides, into the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        return x + normal + self.linear(normal)


def test_a_norm_that_something_else_reads_is_left_alone() -> None:
    block, x = Leaking(), torch.randn(2, 5, 8)

    found = find_sites(block, ["linear"], lambda: block(x).detach())

    assert not found.sites and "computes something else" in found.why_not["linear"]
