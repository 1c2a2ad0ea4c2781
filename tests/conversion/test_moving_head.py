"""A quantized head goes into another container as it is where loaders take one there, or is refused before work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evals.peers.decode import decode_folder
from quantkit import LLM, SamplingParams
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.verify import VerifyOptions, verify
from quantkit.core.scheme_names import parse_scheme
from quantkit.errors import FormatError
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.registry import get_format
from quantkit.formats.summary import summarize
from quantkit.methods.registry import get_rounding
from tests.conversion.conftest import edit_config, edit_tensors, save_tiny

QUICK = VerifyOptions(num_tokens=0)
HEAD = parse_scheme("w8a16-channel")


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in compressed-tensors whose head is quantized too, as llm-compressor leaves one where lm_head is not ignored."""
    folder, fmt = tmp_path_factory.mktemp("headed"), get_format("compressed-tensors")
    save_tiny(folder / "tiny", intermediate_size=64)
    convert(str(folder / "tiny"), folder / "source", ConvertOptions(recipe="w4a16-rtn", measure=False))

    def quantize_head(tensors: dict[str, torch.Tensor]) -> None:
        assert HEAD.weight is not None
        q = get_rounding("mse")(tensors.pop("lm_head.weight"), HEAD.weight, torch.float16, None)
        tensors.update({f"lm_head.{name}": part for name, part in fmt.encode(q, HEAD).items()})

    schemes = OpenedCheckpoint(folder / "source").schemes | {"lm_head": HEAD}
    edit_config(folder / "source", quantization_config=fmt.config(schemes, []))
    return edit_tensors(folder / "source", quantize_head)


def same(one: Path, other: Path) -> bool:
    """Judged by a decoder that shares nothing with ours."""
    first, second = decode_folder(one).tensors, decode_folder(other).tensors
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_quantized_head_goes_to_gptq_and_back_bit_for_bit(headed: Path, tmp_path: Path) -> None:
    there = convert(str(headed), tmp_path / "gptq", ConvertOptions(format="gptq"))
    back = convert(str(tmp_path / "gptq"), tmp_path / "back", ConvertOptions(format="compressed-tensors"))

    assert there.losslessness == back.losslessness == "15 of 15 layers lossless" and not there.left_alone
    config = OpenedCheckpoint(tmp_path / "gptq").reader.quantization_config
    assert config["lm_head"] is True and config["dynamic"] == {"+:^lm_head$": {"bits": 8, "group_size": -1, "sym": True}}
    assert OpenedCheckpoint(tmp_path / "back").reader.quantization_config["ignore"] == []
    assert same(headed, tmp_path / "gptq") and same(headed, tmp_path / "back")
    for out in ("gptq", "back"):
        checked = verify(tmp_path / out, against=str(headed), options=QUICK)
        assert checked.ok and "15 of 15 layers" in next(check.detail for check in checked.checks if check.name == "lossless")
    first, again = OpenedCheckpoint(headed).reader, OpenedCheckpoint(tmp_path / "back").reader
    assert set(first.names) == set(again.names) and all(torch.equal(first.get(name), again.get(name)) for name in first.names)


def test_back_to_bfloat16_the_head_is_decoded_too(headed: Path, tmp_path: Path) -> None:
    convert(str(headed), tmp_path / "out", ConvertOptions(format="bf16"))

    expected = decode_folder(headed).tensors["lm_head.weight"].bfloat16()
    assert torch.equal(OpenedCheckpoint(tmp_path / "out").reader.get("lm_head.weight"), expected)


@pytest.mark.parametrize("requantize", [False, True], ids=["as it is", "requantize"])
@pytest.mark.parametrize("container", ["awq", "fp8", "bitsandbytes"])
def test_a_container_whose_loaders_take_no_quantized_head_is_refused_before_work(
    container: str, requantize: bool, headed: Path, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=rf"lm_head.*: outside the decoder blocks, where loaders of {container} take no quantized layer") as refusal:
        convert(str(headed), tmp_path / "out", ConvertOptions(format=container, requantize=requantize))

    assert "--requantize" not in str(refusal.value) and "bf16" in str(refusal.value) and "compressed-tensors" in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("container", ["compressed-tensors", "gptq"])
def test_a_config_that_says_otherwise_of_the_head_is_found(container: str, headed: Path, tmp_path: Path) -> None:
    convert(str(headed), tmp_path / "out", ConvertOptions(format=container))
    config = OpenedCheckpoint(tmp_path / "out").reader.quantization_config
    edit_config(tmp_path / "out", quantization_config=config | ({"lm_head": False} if container == "gptq" else {"ignore": ["lm_head"]}))

    (problem,) = [check for check in verify(tmp_path / "out", options=QUICK).checks if not check.ok]
    assert problem.name == "config" and "lm_head is quantized" in problem.detail


def test_engines_that_read_the_heads_weight_as_it_is_are_named(headed: Path, tmp_path: Path) -> None:
    convert(str(headed), tmp_path / "out", ConvertOptions(format="gptq"))

    found = {verdict.engine: verdict for verdict in summarize(tmp_path / "out").verdicts}
    assert {name for name, verdict in found.items() if "lm_head is w8a16-channel" in verdict.reason} == {"transformers", "TGI"}
    assert found["vLLM"].loads is True and found["quantkit"].loads is True
    with pytest.raises(FormatError, match=r"TGI .* would not load gptq .*: reads the head's weight as it is"):
        convert(str(headed), tmp_path / "other", ConvertOptions(format="gptq", target_engines=("tgi",)))


@torch.no_grad()
def test_transformers_and_our_runtime_run_the_quantized_head(headed: Path, tmp_path: Path) -> None:
    convert(str(headed), tmp_path / "gptq", ConvertOptions(format="gptq"))
    convert(str(tmp_path / "gptq"), tmp_path / "back", ConvertOptions(format="compressed-tensors"))
    dense = AutoModelForCausalLM.from_pretrained(headed.parent / "tiny", dtype=torch.float32).eval()
    dense.load_state_dict({name: tensor.float() for name, tensor in decode_folder(headed).tensors.items()})
    prompt = torch.arange(5, 21)[None]

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    assert "lm_head" in json.dumps(OpenedCheckpoint(tmp_path / "back").reader.quantization_config["config_groups"])
    torch.testing.assert_close(theirs(prompt).logits, dense(prompt).logits, atol=2e-4, rtol=0)
    expected = dense.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 16:].tolist()
    for out in (tmp_path / "gptq", tmp_path / "back"):
        llm = LLM(str(out), mode="exact")
        (answer,) = llm.generate([prompt[0].tolist()], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        assert answer.completions[0].token_ids == expected
