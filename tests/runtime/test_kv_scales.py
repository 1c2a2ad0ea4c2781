"""FP8 scales that a checkpoint carries for its keys and values: read, told of, and used by the cache as plain torch would use them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from quantkit_kernels import reference as kernels
from torch import Tensor, nn
from transformers import AttentionInterface

import quantkit
from quantkit.cli import main
from quantkit.conversion.calibration import CalibrationOptions
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.errors import CheckpointError, FormatError
from quantkit.formats.streamed import open_streamed
from quantkit.models.compare import TokenRows, compare
from quantkit.runtime.llm import LLM
from tests.conversion.conftest import edit_config, edit_tensors, save_tiny
from tests.runtime.conftest import dequantized_model
from tests.runtime.test_engine import engine, greedy
from tests.runtime.test_w8a8 import closed

LAYERS, HEADS = 6, 2
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
PER_HEAD = SCHEME | {"strategy": "attn_head"}
SETTINGS: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
Scales = dict[str, Tensor]


def with_scheme(folder: Path, scheme: dict[str, Any] | None, scales: Scales) -> Path:
    """A checkpoint as a calibration of its KV cache leaves it."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=config | {"kv_cache_scheme": scheme})
    return edit_tensors(folder, lambda tensors: tensors.update(scales))


def scales_of(*, per_head: bool = False, spelling: str = "self_attn.{}_scale") -> Scales:
    """Unlike for every layer, keys and values (and head); so small that many values saturate."""
    draws = torch.Generator().manual_seed(4)
    shape = (HEADS, 1, 1) if per_head else (1,)
    names = [f"model.layers.{layer}.{spelling.format(part, part)}" for layer in range(LAYERS) for part in "kv"]
    return {name: (torch.rand(shape, generator=draws) * 0.004 + 0.002).bfloat16() for name in names}


@pytest.fixture(scope="module")
def plain(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "out"
    convert(str(reference), folder, ConvertOptions(recipe="w4a16-rtn", measure=False))
    return folder


@pytest.fixture
def checkpoint(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    def build(scheme: dict[str, Any] | None = SCHEME, scales: Scales | None = None) -> Path:
        return with_scheme(shutil.copytree(plain, tmp_path / "out"), scheme, scales_of() if scales is None else scales)

    return build


@contextmanager
def rounded_attention(scales: Scales) -> Iterator[str]:
    """Plain attention over keys and values that went through FP8 at the scales of their layer."""

    def through_fp8(x: Tensor, scale: Tensor) -> Tensor:
        scale = scale.float().reshape(1, -1, 1, 1)
        return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **others: Any) -> tuple[Tensor, None]:
        of = f"model.layers.{module.layer_idx}.self_attn."
        key, value = through_fp8(key, scales[f"{of}k_scale"]), through_fp8(value, scales[f"{of}v_scale"])
        repeats = query.shape[1] // key.shape[1]
        scores = query.float() @ key.repeat_interleave(repeats, 1).transpose(2, 3) * scaling
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.repeat_interleave(repeats, 1)).transpose(1, 2), None

    AttentionInterface.register("fp8_at_given_scales", attend)
    yield "fp8_at_given_scales"


def logprobs_by_transformers(folder: Path, scales: Scales, prompts: list[list[int]]) -> Tensor:
    model = dequantized_model(folder)
    with rounded_attention(scales) as name, torch.no_grad():
        model.set_attn_implementation(name)
        rows = [model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1) for prompt in prompts]
    return torch.cat([row.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0] for row, prompt in zip(rows, prompts, strict=True)])


def logprobs_of(llm: LLM, prompts: list[list[int]]) -> Tensor:
    return torch.tensor([each.logprob for out in llm.generate(prompts, **SETTINGS) for each in out.prompt_logprobs[1:]])


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("per_head", [False, True], ids=["one a tensor", "one a head"])
def test_the_cache_holds_what_the_checkpoints_scales_round_to(
    per_head: bool, kv_cache_dtype: str, plain: Path, checkpoint: Callable[..., Path], prompts: list[list[int]]
) -> None:
    scales = scales_of(per_head=per_head)
    folder = checkpoint(PER_HEAD if per_head else SCHEME, scales)
    llm = engine(folder, kv_cache_dtype=kv_cache_dtype, max_chunk=17)

    found, expected = logprobs_of(llm, prompts[:8]), logprobs_by_transformers(plain, scales, prompts[:8])

    assert {layer.k.dtype for layer in llm.engine.cache.layers} == {torch.float8_e4m3fn}
    apart = (found - expected).abs()  # a value at the border of two codes may fall to the other one, which later tokens see
    assert apart.median() < 2e-5 and apart.mean() < 5e-4 and apart.quantile(0.99) < 1e-2
    exact = logprobs_of(engine(folder, kv_cache_dtype="float32"), prompts[:8])
    assert (exact - expected).abs().mean() > 100 * apart.mean(), (apart.median(), apart.mean(), apart.quantile(0.99))


def test_values_beyond_the_range_take_its_end_and_scales_are_kept_for_every_token() -> None:
    k, v = torch.tensor([[[1000.0, -2.0], [0.5, 3.0]]]), torch.zeros(1, 2, 2)
    caches = torch.zeros(1, 2, 2, 4, dtype=torch.float8_e4m3fn), torch.zeros(1, 2, 4, 2, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)

    kernels.store_kv(*caches, k, v, torch.tensor([2]), *scales, (torch.tensor([0.5, 0.25]), torch.tensor([2.0, 2.0])))

    assert caches[0][0, :, :, 2].float().tolist() == [[448.0, -4.0], [2.0, 12.0]]
    assert scales[0][0].tolist() == [[0, 0, 0.5, 0], [0, 0, 0.25, 0]] and scales[1][0, :, 2].tolist() == [2.0, 2.0]


def test_tokens_do_not_depend_on_the_batch(checkpoint: Callable[..., Path], prompts: list[list[int]]) -> None:
    folder = checkpoint()

    whole = greedy(engine(folder), prompts[:5], 10)

    assert greedy(engine(folder, max_chunk=7, max_sequences=2), prompts[:5], 10) == whole


@pytest.mark.parametrize("name", ["float32", "int8", "bfloat16"])
def test_another_type_ignores_them_and_says_so_once(
    name: str, plain: Path, checkpoint: Callable[..., Path], prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "quantkit"):
        llm = engine(checkpoint(), kv_cache_dtype=name)

    assert sum("FP8 scales are not used" in record.message for record in caplog.records) == 1
    assert greedy(llm, prompts[:3], 6) == greedy(engine(plain, kv_cache_dtype=name), prompts[:3], 6)


def test_scales_that_nobody_asks_for_wait_for_an_fp8_cache(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(None)

    assert engine(folder).engine.cache.layers[0].k.dtype == torch.float32
    assert engine(folder, kv_cache_dtype="fp8").engine.cache.layers[5].fixed_scales is not None


def test_a_scheme_without_stored_scales_finds_them_itself(checkpoint: Callable[..., Path]) -> None:
    (layer, *_) = engine(checkpoint(SCHEME | {"dynamic": True}, {})).engine.cache.layers

    assert layer.k.dtype == torch.float8_e4m3fn and layer.fixed_scales is None


@pytest.mark.parametrize("spelling", ["self_attn.{}_proj.output_scale", "self_attn.{}_proj.{}_scale"])
def test_older_names_are_the_same_scales(spelling: str, checkpoint: Callable[..., Path]) -> None:
    folder, wanted = checkpoint(scales=scales_of(spelling=spelling)), scales_of()

    keys, values = engine(folder).engine.cache.layers[3].fixed_scales

    assert keys.tolist() == [wanted["model.layers.3.self_attn.k_scale"].item()] * HEADS
    assert values.tolist() == [wanted["model.layers.3.self_attn.v_scale"].item()] * HEADS
    assert verify(folder, options=VerifyOptions(num_tokens=0)).ok


def test_a_checkpoint_without_the_models_prefix_has_its_scales_too(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}
    edit_config(folder, quantization_config=config)
    edit_tensors(folder, lambda t: t.update({f"layers.{i}.self_attn.{p}_scale": torch.tensor([0.01 + i]) for i in range(2) for p in "kv"}))

    (first, second) = engine(folder).engine.cache.layers

    assert first.fixed_scales[0].tolist() == [pytest.approx(0.01)] * 2 and second.fixed_scales[1].tolist() == [pytest.approx(1.01)] * 2
    assert verify(folder, options=VerifyOptions(num_tokens=0)).ok


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Scales], object], type[Exception], str]] = {
    "asymmetric": (SCHEME | {"symmetric": False}, lambda s: None, FormatError, "asymmetric is not read; .* give a kv_cache_dtype"),
    "of integers": (SCHEME | {"type": "int"}, lambda s: None, FormatError, "8-bit int, one scale a tensor is not read"),
    "one missing": (SCHEME, lambda s: s.pop("model.layers.2.self_attn.v_scale"), CheckpointError, "layer 2 has no v_scale"),
    "zero": (SCHEME, lambda s: s["model.layers.1.self_attn.k_scale"].zero_(), CheckpointError, r"k_scale holds \[0.0\]; scales are finite"),
    "of other heads": (PER_HEAD, lambda s: s.update({"model.layers.1.self_attn.k_scale": torch.ones(3)}), CheckpointError, "one for each of 2 heads"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(case: str, checkpoint: Callable[..., Path]) -> None:
    scheme, spoil, error, message = REFUSED[case]
    scales = scales_of()
    spoil(scales)
    folder = checkpoint(scheme, scales)

    with pytest.raises(error, match=message):
        engine(folder)
    failed = [check for check in verify(folder, options=VerifyOptions(num_tokens=0)).checks if not check.ok]
    assert [check.name for check in failed] == ["KV scales"]
    if error is FormatError:
        assert len(greedy(engine(folder, kv_cache_dtype="bfloat16"), [[5, 6]], 2)[0]) == 2


def test_they_are_inspected_and_verified_by_name(reference: Path, plain: Path, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint()

    summary, result = quantkit.inspect(str(folder)), verify(folder, against=str(reference), options=VerifyOptions(num_tokens=0))

    assert summary.kv_cache == "FP8 (e4m3), one scale a tensor; 12 stored"
    assert summary.to_dict()["kv_cache"] == summary.kv_cache and quantkit.inspect(str(plain)).kv_cache is None
    assert summary.parameters == quantkit.inspect(str(plain)).parameters
    assert result.ok, [check for check in result.checks if not check.ok]
    told = {check.name: check.detail for check in result.checks}
    assert told["KV scales"] == "FP8 (e4m3), one scale a tensor; of 6 layers" and told["extra tensors"] == "no tensor too many"


def test_the_command_names_the_scheme(checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(checkpoint(PER_HEAD, scales_of(per_head=True)))])

    assert "KV cache: FP8 (e4m3), one scale a head; 12 stored" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("per_head", [False, True], ids=["one a tensor", "one a head"])
def test_divergence_is_measured_with_keys_and_values_as_the_cache_holds_them(
    per_head: bool, plain: Path, checkpoint: Callable[..., Path], prompts: list[list[int]]
) -> None:
    scales = scales_of(per_head=per_head)
    folder = checkpoint(PER_HEAD if per_head else SCHEME, scales)
    ids = torch.tensor([prompt[:40] for prompt in prompts if len(prompt) >= 40][:6])
    model = dequantized_model(plain)
    with torch.no_grad():
        exact = model(ids).logits[:, :-1].double().log_softmax(-1)
        with rounded_attention(scales) as name:
            model.set_attn_implementation(name)
            rounded = model(ids).logits[:, :-1].double().log_softmax(-1)

    result = compare(open_streamed(plain, "plain"), open_streamed(folder, "with an FP8 cache"), TokenRows.of_texts(ids))

    assert result.kl_mean == pytest.approx((exact.exp() * (exact - rounded)).sum(-1).mean().item(), rel=1e-2)


@pytest.mark.parametrize("kind", ["fp8", "fp8-head"])
def test_scales_that_a_conversion_calibrated_are_used_and_lose_little(kind: str, reference: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    few = CalibrationOptions(num_samples=8, seq_len=128)
    options = ConvertOptions(ignore=(".*",), kv_cache=kind, calibration=few, measure=False)
    convert(str(reference), tmp_path / "out", options)
    texts = prompts[12:28]

    scaled, plain = (engine(folder).generate(texts, **SETTINGS | {"prompt_logprobs": 64}) for folder in (tmp_path / "out", reference))

    kl = []
    for ours, its in zip(scaled, plain, strict=True):
        for entry, other in zip(ours.prompt_logprobs[1:], its.prompt_logprobs[1:], strict=True):
            known, there = dict(entry.top), dict(other.top)
            both = [token for token in there if token in known]
            kl.append(closed(*(torch.tensor([top[token] for token in both], dtype=torch.float64) for top in (there, known))))
    (layer, *_) = engine(tmp_path / "out").engine.cache.layers
    assert layer.k.dtype == torch.float8_e4m3fn and layer.fixed_scales is not None
    assert (len(set(layer.fixed_scales[0].tolist())) == 1) == (kind == "fp8")
    assert 1e-5 < sum(kl) / len(kl) < 3e-3, sum(kl) / len(kl)
