"""LoRA adapters in PEFT's format on a loaded model of any weights: each token takes the adapter its request names, several of them in one batch.

y = W x + scale * B (A x), with scale = alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilized (arXiv 2106.09685, 2312.03732).
Weights are read from safetensors only: a pickle runs code when it is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from quantkit import ops
from quantkit.errors import SourceError
from quantkit.runtime.linear import PackedLinear
from quantkit.runtime.loader import LoadedModel
from quantkit.runtime.step import current

_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
_UNSUPPORTED = ("use_dora", "modules_to_save", "lora_bias", "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters")


class AdaptedLinear(nn.Module):
    """A linear of a block, and what each adapter adds to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.adapters: dict[str, tuple[ops.Linear, ops.Linear]] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        for name, rows in current().adapters.items():
            if name in self.adapters:
                down, up = self.adapters[name]
                tokens = x.reshape(-1, x.shape[-1])[rows]
                y.view(-1, y.shape[-1]).index_add_(0, rows, up(down(tokens)).to(y.dtype))
        return y


def check(folders: Iterable[str]) -> None:
    """Refuse, before a model is loaded, what holds no adapter for any.

    Raises:
        SourceError: as `attach`, for what can be seen without the model.
    """
    for folder in map(Path, folders):
        _config(folder)
        _file(folder)


def attach(loaded: LoadedModel, folders: Mapping[str, str], mode: ops.Mode) -> None:
    """Load the adapters of these names and put them on the model.

    Raises:
        SourceError: a folder holds no such adapter, one of a kind that is not run, or one that does not fit the model.
    """
    for name, folder in folders.items():
        for path, (a, b) in read_adapter(Path(folder), loaded.model).items():
            linear = loaded.model.get_submodule(path)
            if not isinstance(linear, AdaptedLinear):
                linear = AdaptedLinear(linear)
                loaded.model.set_submodule(path, linear)
            down, up = (ops.dense_linear(t.to(loaded.device), mode) for t in (a, b))
            linear.adapters[name] = (down, up)


def read_adapter(folder: Path, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, K] and B [N, r] by the path of the module they adapt; B holds the scale.

    Raises:
        SourceError: as `attach`.
    """
    config = _config(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(folder).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise SourceError(f"{folder} holds {name}, which is no LoRA weight of a linear; adapters of linears alone are run")
        pairs.setdefault(match["path"], {})[match["part"]] = tensor.float()
    if not pairs:
        raise SourceError(f"{folder} adapts no layer")
    return {path: _fitted(folder, path, pair, config, model) for path, pair in pairs.items()}


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read, so {folder} is no PEFT adapter: {error}") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file} holds no JSON object, so {folder} is no PEFT adapter")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{folder} is an adapter of type {kind}; LORA is run")
    if config.get("bias", "none") != "none":
        raise SourceError(f"{folder} adapts biases (bias is {config['bias']!r}); adapters with bias 'none' are run")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise SourceError(f"{folder} was made by {start}, which changes the base model's weights too; convert it to a plain LoRA with PEFT first")
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    if unsupported:
        raise SourceError(f"{folder} uses {', '.join(unsupported)}, which is not run")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise SourceError(f"{file} is damaged: r is {rank!r} and lora_alpha {alpha!r}, which are to be numbers")
    return config


def _file(folder: Path) -> Path:
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        is_pickle = (folder / "adapter_model.bin").exists()
        hint = "; its adapter_model.bin is a pickle, which runs code when opened: save it as safetensors" if is_pickle else ""
        raise SourceError(f"{folder} has no adapter_model.safetensors{hint}")
    return file


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = _file(folder)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{file} is damaged: {error}") from error


def _fitted(folder: Path, path: str, pair: dict[str, Tensor], config: dict[str, Any], model: nn.Module) -> tuple[Tensor, Tensor]:
    module = dict(model.named_modules()).get(path)
    if module is None:
        raise SourceError(f"{folder} adapts {path}, which {type(model).__name__} does not have")
    sees_every_token = "experts" not in path.split(".") and module is not model.get_output_embeddings()
    if not isinstance(module, PackedLinear | AdaptedLinear) or not sees_every_token:
        raise SourceError(f"{folder} adapts {path}; linears of blocks are run with adapters, not experts, embeddings or the head")
    if set(pair) != {"A", "B"}:
        raise SourceError(f"{folder} has only lora_{next(iter(pair))} of {path}")
    a, b = pair["A"], pair["B"]
    rank = a.shape[0]
    if a.dim() != 2 or b.dim() != 2 or b.shape[1] != rank or (rank != config["r"] and not config.get("rank_pattern")):
        raise SourceError(f"{folder}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {path} do not make a product of rank {config['r']}")
    inner = module.inner if isinstance(module, AdaptedLinear) else module
    if (b.shape[0], a.shape[1]) != inner.shape:
        raise SourceError(f"{folder}: {path} is {list(inner.shape)} in the model, and the adapter is for {[b.shape[0], a.shape[1]]}")
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return a, b * scale
