"""LoRA adapters: the tokens of merged weights, each request with its own adapter in one batch, and clear refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.errors import RequestError, SourceError
from quantkit.runtime.llm import LLM
from tests.runtime.conftest import greedy_by_transformers

TARGETS = {"first": ("q_proj", "v_proj"), "second": ("o_proj", "down_proj", "gate_proj")}


def write_adapter(folder: Path, model: torch.nn.Module, targets: tuple[str, ...], **config: Any) -> Path:
    """As PEFT saves it, with weights large enough to change what is said."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "bias": "none", "target_modules": list(targets)} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(len(targets))
    tensors = {}
    for path, module in model.named_modules():
        if path.endswith(targets):
            rows, columns = module.weight.shape
            for part, shape in (("A", (4, columns)), ("B", (rows, 4))):
                tensors[f"base_model.model.{path}.lora_{part}.weight"] = torch.randn(shape, generator=generator) * 0.12
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merge(model: torch.nn.Module, folder: Path, scale: float) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_A." in name]:
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        module.weight.data += scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]


@pytest.fixture(scope="module")
def adapters(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("adapters")
    settings = {"first": {}, "second": {"use_rslora": True}}
    return {name: str(write_adapter(folder / name, model, TARGETS[name], **settings[name])) for name in TARGETS}


def test_two_adapters_and_none_in_one_batch_say_what_merged_weights_say(
    reference: Path, prompts: list[list[int]], adapters: dict[str, str], tmp_path: Path
) -> None:
    expected = {None: greedy_by_transformers(reference)(prompts[:3], 12)}
    for name, scale in (("first", 12 / 4), ("second", 12 / 2)):
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
        merge(model, Path(adapters[name]), scale)
        model.save_pretrained(tmp_path / name)
        expected[name] = greedy_by_transformers(tmp_path / name)(prompts[:3], 12)
    order = [None, "first", "second"] * 3
    llm = LLM(str(reference), mode="exact", kv_cache_memory=8 << 20, lora=adapters)

    found = llm.generate([prompts[i // 3] for i in range(9)], max_tokens=12, temperature=0, ignore_eos=True, lora=order)

    for i, out in enumerate(found):
        assert expected[order[i]][i // 3].allows(out.completions[0].token_ids)
    assert len({tuple(out.completions[0].token_ids) for out in found[6:]}) == 3


def test_prefixes_are_shared_within_one_adapter_only(reference: Path, prompts: list[list[int]], adapters: dict[str, str]) -> None:
    llm = LLM(str(reference), mode="exact", kv_cache_memory=8 << 20, lora=adapters)
    prompt = max(prompts, key=len)

    cached = [llm.generate(prompt, max_tokens=1, temperature=0, lora=name)[0].num_cached for name in (None, "first", "second", "first", None)]

    assert cached[:3] == [0, 0, 0] and min(cached[3:]) > 0


def test_an_adapter_on_quantized_weights_adds_to_what_they_say(
    reference: Path, prompts: list[list[int]], adapters: dict[str, str], tmp_path: Path
) -> None:
    convert(str(reference), tmp_path / "out", ConvertOptions(recipe="w4a16-rtn"))
    model = LLM(str(tmp_path / "out"), mode="exact", kv_cache_memory=8 << 20, lora=adapters)

    alone = [model.generate(p, max_tokens=10, temperature=0, ignore_eos=True, lora="first")[0].completions[0].token_ids for p in prompts[:4]]
    together = model.generate(prompts[:4], max_tokens=10, temperature=0, ignore_eos=True, lora=["first", "second", None, "first"])

    tokens = [out.completions[0].token_ids for out in together]
    assert (tokens[0], tokens[3]) == (alone[0], alone[3]) and tokens[1] != alone[1] and tokens[2] != alone[2]


def edit(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | values))

    return change


def rename(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def holding(name: str, *shapes: tuple[int, int]) -> Callable[[Path], object]:
    tensors = {f"base_model.model.{name}.lora_{part}.weight": torch.zeros(shape) for part, shape in zip("AB", shapes, strict=False)}
    return lambda folder: save_file(tensors, folder / "adapter_model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (rename, "adapter_model.bin is a pickle"),
    "not whole": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\1\2\3"), "is damaged"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "is no PEFT adapter"),
    "kind": (edit(peft_type="IA3"), "of type IA3; LORA is run"),
    "bias": (edit(bias="all"), "adapts biases"),
    "dora": (edit(use_dora=True), "uses use_dora"),
    "rank": (edit(r=8), "do not make a product of rank 8"),
    "no such module": (holding("model.layers.99.self_attn.q_proj", (4, 8), (8, 4)), r"adapts model.layers.99.self_attn.q_proj, which"),
    "head": (holding("lm_head", (4, 8), (8, 4)), "adapts lm_head; linears of blocks"),
    "shape": (holding("model.layers.0.self_attn.q_proj", (4, 8), (8, 4)), r"and the adapter is for \[8, 8\]"),
    "half": (holding("model.layers.0.self_attn.q_proj", (4, 8)), "has only lora_A"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_with_its_reason(case: str, reference: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference)
    folder = write_adapter(tmp_path / "adapter", model, ("q_proj",))
    spoil, message = REFUSED[case]
    spoil(folder)

    with pytest.raises(SourceError, match=message):
        LLM(str(reference), kv_cache_memory=8 << 20, lora={"mine": str(folder)})


def test_unknown_adapters_are_answered_with_near_names(reference: Path, prompts: list[list[int]], adapters: dict[str, str]) -> None:
    llm = LLM(str(reference), kv_cache_memory=8 << 20, lora=adapters)
    with pytest.raises(RequestError, match=r"no adapter 'frist' is loaded; did you mean 'first'\?"):
        llm.generate(prompts[0], lora="frist", max_tokens=1)


def test_adapters_that_change_the_base_model_too_are_refused(reference: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32)
    folder = write_adapter(tmp_path / "pissa", model, ("q_proj",), init_lora_weights="pissa_niter_4")

    with pytest.raises(SourceError, match="was made by pissa_niter_4, which changes the base model's weights too"):
        LLM(str(reference), lora={"a": str(folder)}, kv_cache_memory=8 << 20)
