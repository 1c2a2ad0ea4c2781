"""What a quantized folder lost against its baseline: KL, perplexity and top-1 agreement on held-out tokens, in plain transformers.

    python kl.py BASE QUANT --tokens heldout.safetensors
    python kl.py BASE QUANT --against OTHER --tokens heldout.safetensors   # paired: KL(QUANT) - KL(OTHER), token by token

Both models run in float32 from decoded weights (decode.py). KL(base || quantized) is in nats, over next-token distributions.
Two standard errors are given: over tokens, and over rows, which allows for the likeness of tokens within a row.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from decode import decode_folder
from tokens import load_tokens
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Evaluation:
    """Per-token results, each [rows, seq_len - 1]."""

    kl: torch.Tensor
    base_loss: torch.Tensor
    loss: torch.Tensor
    agrees: torch.Tensor
    linear_bpw: float | None
    file_bytes: int

    def summary(self) -> dict[str, float | int | None]:
        return {
            **mean_and_errors(self.kl, "kl"),
            "ppl": self.loss.mean().exp().item(),
            "ppl_base": self.base_loss.mean().exp().item(),
            "top1_agreement": self.agrees.double().mean().item(),
            "linear_bpw": self.linear_bpw,
            "file_bytes": self.file_bytes,
            "tokens": self.kl.numel(),
        }


def mean_and_errors(values: torch.Tensor, name: str) -> dict[str, float]:
    """Mean of [rows, tokens] with its standard error over tokens and over rows."""
    rows = values.mean(1)
    return {
        name: values.mean().item(),
        f"{name}_se": (values.std() / values.numel() ** 0.5).item(),
        f"{name}_se_rows": (rows.std() / len(rows) ** 0.5).item(),
    }


def load_model(folder: Path) -> tuple[PreTrainedModel, float | None, int]:
    """A float32 transformers model with the folder's decoded weights; bits per weight of its linears; bytes of its files."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    decoded = decode_folder(folder)
    missing, unexpected = model.load_state_dict(decoded.tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise SystemExit(f"{folder}: missing {sorted(set(missing) - tied)[:4]}, not known {unexpected[:4]}")
    model.tie_weights()
    return model, decoded.linear_bpw, decoded.file_bytes


class Baseline:
    """The unquantized model's answer to the held-out tokens, kept so that one pass serves every comparison.

    Memory: rows x (seq_len - 1) x vocabulary in float32.
    """

    @torch.inference_mode()
    def __init__(self, folder: Path, tokens: torch.Tensor, tokens_digest: str = "", *, batch: int = 8) -> None:
        model, _, _ = load_model(folder)
        self.batches = tokens.split(batch)
        self.tokens_digest = tokens_digest
        self.log_probs = [model(rows).logits[:, :-1].log_softmax(-1) for rows in self.batches]


@torch.inference_mode()
def evaluate(base: Baseline, folder: Path) -> Evaluation:
    """Compare the folder's next-token distributions with the baseline's on every position that has a next token."""
    model, linear_bpw, file_bytes = load_model(folder)
    parts: list[list[torch.Tensor]] = []
    for rows, p in zip(base.batches, base.log_probs, strict=True):
        q = model(rows).logits[:, :-1].log_softmax(-1)
        target = rows[:, 1:, None]
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        parts.append([kl, -p.gather(-1, target)[..., 0], -q.gather(-1, target)[..., 0], p.argmax(-1) == q.argmax(-1)])
    kl, base_loss, loss, agrees = (torch.cat(column) for column in zip(*parts, strict=True))
    return Evaluation(kl.double(), base_loss.double(), loss.double(), agrees, linear_bpw, file_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("quant", type=Path)
    parser.add_argument("--against", type=Path, help="a second quantized folder to compare with, token by token")
    parser.add_argument("--tokens", type=Path, required=True)
    args = parser.parse_args()
    base = Baseline(args.base, load_tokens(args.tokens))
    one = evaluate(base, args.quant)
    result: dict[str, object] = one.summary()
    if args.against:
        other = evaluate(base, args.against)
        result = {"quant": result, "against": other.summary(), **mean_and_errors(one.kl - other.kl, "kl_difference")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
