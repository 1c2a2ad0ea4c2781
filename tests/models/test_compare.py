"""Streamed comparison against two whole transformers models, and against a model with activation quantization run by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from quantkit.core.activations import fake_quantize
from quantkit.core.data_free import quantize
from quantkit.core.divergence import Divergence
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import CheckpointError, SourceError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import FORMATS
from quantkit.formats.streamed import open_streamed
from quantkit.models.architecture import describe, load_config
from quantkit.models.compare import StreamedModel, TokenRows, compare, logit_places, perplexity


def streamed(folder: Path, label: str = "the model") -> StreamedModel:
    opened = OpenedCheckpoint(folder)
    return StreamedModel(describe(load_config(folder), opened), opened, opened.schemes, label)


def some_rows(vocabulary: int = 4096, shape: tuple[int, int] = (5, 24)) -> TokenRows:
    return TokenRows.of_texts(torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0)))


def whole(peers: Path, name: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(peers / "tiny", dtype=torch.float32).eval()
    opened = OpenedCheckpoint(peers / name)
    model.load_state_dict({n: opened.get(n).float() for n in opened.names}, strict=True)
    return model


def expected_divergence(base: torch.nn.Module, quantized: torch.nn.Module, rows: TokenRows) -> Divergence:
    divergence = Divergence()
    with torch.no_grad():
        logits = [model(rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits for model in (base, quantized)]
    divergence.add(*logits, rows.targets, rows.counted)
    return divergence


@pytest.mark.parametrize("name", ["gptq_b4_g128", "ct_w4a16_asym_awq"])
def test_streamed_comparison_equals_that_of_two_whole_models(name: str, peers: Path) -> None:
    rows = some_rows()
    seen: list[tuple[str, int, int]] = []

    result = compare(streamed(peers / "tiny", "base"), streamed(peers / name, "quant"), rows, batch_size=2, progress=lambda *at: seen.append(at))

    expected = expected_divergence(whole(peers, "tiny"), whole(peers, name), rows).result()
    assert result.num_tokens == expected.num_tokens == 5 * 23
    assert result.kl_mean == pytest.approx(expected.kl_mean, rel=1e-4)
    assert result.ppl_ratio == pytest.approx(expected.ppl_ratio, rel=1e-5)
    assert result.top1 == expected.top1
    assert seen[0] == ("base", 1, 4)
    assert seen[-1] == ("quant", 4, 4)
    assert perplexity(streamed(peers / name), rows, batch_size=3).ppl == pytest.approx(expected.ppl_quantized, rel=1e-5)


def test_activations_of_w8a8_layers_are_quantized_in_the_forward_pass(peers: Path) -> None:
    rows = some_rows()
    quantized = whole(peers, "ct_w8a8_gptq")
    modules = dict(quantized.named_modules())
    for name, scheme in OpenedCheckpoint(peers / "ct_w8a8_gptq").schemes.items():
        modules[name].register_forward_pre_hook(lambda _, inputs, spec=scheme.activation: (fake_quantize(inputs[0], spec),))

    result = compare(streamed(peers / "tiny"), streamed(peers / "ct_w8a8_gptq"), rows)

    expected = expected_divergence(whole(peers, "tiny"), quantized, rows).result()
    weights_only = expected_divergence(whole(peers, "tiny"), whole(peers, "ct_w8a8_gptq"), rows).result()
    assert result.kl_mean == pytest.approx(expected.kl_mean, rel=2e-2)
    assert abs(result.kl_mean - expected.kl_mean) < 0.1 * abs(result.kl_mean - weights_only.kl_mean)


def test_a_calibrated_scale_of_inputs_is_the_one_taken(peers: Path, tmp_path: Path) -> None:
    scheme, fmt, opened = parse_scheme("fp8-static"), FORMATS["compressed-tensors"], OpenedCheckpoint(peers / "tiny")
    layers = [f"{name}.{leaf}_proj" for name in [f"model.layers.{i}.mlp" for i in range(4)] for leaf in ("gate", "up", "down")]
    tensors = {name: opened.get(name) for name in opened.names if name.removesuffix(".weight") not in layers}
    for layer in layers:
        q = quantize(opened.get(f"{layer}.weight"), scheme.weight, torch.bfloat16)
        q.input_scale = torch.tensor([0.03], dtype=torch.bfloat16)  # narrow: inputs beyond 448 of it are cut
        tensors |= {f"{layer}.{part}": tensor for part, tensor in fmt.encode(q, scheme).items()}
    folder = shutil.copytree(peers / "tiny", tmp_path / "out")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": fmt.config(dict.fromkeys(layers, scheme), ["lm_head"])}))
    quantized = AutoModelForCausalLM.from_pretrained(peers / "tiny", dtype=torch.float32).eval()
    quantized.load_state_dict({name: OpenedCheckpoint(folder).get(name).float() for name in opened.names})
    for layer in layers:
        hook = lambda _, inputs: (fake_quantize(inputs[0], scheme.activation, torch.tensor([0.03]).bfloat16()),)  # noqa: E731
        quantized.get_submodule(layer).register_forward_pre_hook(hook)

    result = compare(open_streamed(peers / "tiny", "base"), open_streamed(folder, "static"), some_rows())

    assert result.kl_mean == pytest.approx(expected_divergence(whole(peers, "tiny"), quantized, some_rows()).result().kl_mean, rel=2e-2)


@pytest.mark.parametrize("at_once", [1, 64, 64 * 7, 64 * 19, 64 * 19 * 3, 1 << 20])
def test_every_token_is_in_one_part_and_no_part_has_too_many_logits(at_once: int) -> None:
    seen = torch.zeros(5, 19, dtype=torch.int64)

    for at in logit_places(seen.shape, 64, at_once):
        seen[at] += 1
        assert seen[at].numel() * 64 <= max(at_once, 64)

    assert bool((seen == 1).all())


def test_a_model_equals_itself(test_data: Path) -> None:
    folder = test_data / "data" / "stories260k-hf"

    result = compare(streamed(folder), streamed(folder), some_rows(512, (2, 40)), batch_size=1)

    assert (result.kl_mean, result.top1, result.ppl_difference) == (0, 1, 0)


def test_texts_in_one_row_are_apart_and_padding_does_not_count(test_data: Path) -> None:
    folder = test_data / "data" / "stories260k-hf"
    ids = torch.randint(3, 512, (1, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(8), torch.arange(9), torch.arange(3)])[None]
    valid = torch.arange(20)[None] < 17

    packed = TokenRows.of_texts(ids, positions, valid)
    alone = [perplexity(streamed(folder), TokenRows.of_texts(part)) for part in (ids[:, :8], ids[:, 8:17])]
    together = perplexity(streamed(folder), packed)

    assert packed.counted[0].nonzero()[:, 0].tolist() == [*range(7), *range(8, 16)]
    logs = [r.num_tokens * torch.tensor(r.ppl).log() for r in alone]
    assert together.ppl == pytest.approx(float((sum(logs) / 15).exp()), rel=1e-4)


class Spoiled:
    """A checkpoint whose one tensor is replaced."""

    def __init__(self, weights: OpenedCheckpoint, name: str, value: float) -> None:
        self.weights, self.name, self.value = weights, name, value

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def get(self, name: str) -> torch.Tensor:
        tensor = self.weights.get(name)
        return torch.full_like(tensor, self.value) if name == self.name else tensor


def test_nan_names_the_model_and_the_block(test_data: Path) -> None:
    folder = test_data / "data" / "stories260k-hf"
    good, opened = streamed(folder, "the baseline model"), OpenedCheckpoint(folder)
    spoiled = Spoiled(opened, "model.layers.2.mlp.up_proj.weight", torch.nan)
    bad = StreamedModel(describe(load_config(folder), opened), spoiled, {}, "the quantized model")

    with pytest.raises(CheckpointError, match=r"the quantized model gives NaN from model\.layers\.2 on"):
        compare(good, bad, some_rows(512, (1, 8)))


def test_a_missing_tensor_is_named(test_data: Path) -> None:
    folder = test_data / "data" / "stories260k-hf"
    opened = OpenedCheckpoint(folder)
    absent = "model.layers.1.self_attn.q_proj.weight"

    class Lacking(Spoiled):
        def __contains__(self, name: object) -> bool:
            return name != absent and name in self.weights

    with pytest.raises(SourceError, match=absent):
        perplexity(StreamedModel(describe(load_config(folder), opened), Lacking(opened, "", 0)), some_rows(512, (1, 8)))
