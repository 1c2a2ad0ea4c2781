"""Write token rows for calibration or evaluation, so that every tool sees exactly the same ids.

    python tokens.py MODEL --text a.txt b.txt --rows 128 --seq-len 256 --seed 0 --out calib.safetensors

The file holds one tensor, `input_ids`, int64 [rows, seq_len]. Rows are disjoint windows of the text, drawn without replacement; each
starts with the model's BOS token if its tokenizer adds one. Several texts give equal shares of the rows. A .jsonl file gives the `text`
of its rows, joined by blank lines.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def draw_rows(ids: torch.Tensor, *, rows: int, seq_len: int, bos: int | None, generator: torch.Generator) -> torch.Tensor:
    """`rows` of the disjoint windows of `ids`, in random order -> [rows, seq_len]."""
    body = seq_len - (bos is not None)
    windows = ids[: len(ids) // body * body].view(-1, body)
    if len(windows) < rows:
        raise SystemExit(f"the text has {len(windows)} windows of {body} tokens; {rows} are asked for")
    picked = windows[torch.randperm(len(windows), generator=generator)[:rows]]
    return picked if bos is None else torch.cat([torch.full((rows, 1), bos), picked], dim=1)


def read_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return "\n\n".join(json.loads(line)["text"] for line in text.splitlines()) if path.suffix == ".jsonl" else text


def make_tokens(model: Path, texts: list[Path], *, rows: int, seq_len: int, seed: int) -> torch.Tensor:
    """Token rows of `texts` for the tokenizer in `model` -> int64 [rows, seq_len]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    bos = tokenizer.bos_token_id if adds_bos else None
    generator = torch.Generator().manual_seed(seed)
    shares = [rows * (i + 1) // len(texts) - rows * i // len(texts) for i in range(len(texts))]
    parts = []
    for text, share in zip(texts, shares, strict=True):
        ids = tokenizer(read_text(text), add_special_tokens=False, verbose=False).input_ids
        parts.append(draw_rows(torch.tensor(ids), rows=share, seq_len=seq_len, bos=bos, generator=generator))
    everything = torch.cat(parts)
    return everything[torch.randperm(rows, generator=generator)]


def save_tokens(rows: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": rows.contiguous()}, path)


def load_tokens(path: Path) -> torch.Tensor:
    return load_file(path)["input_ids"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    save_tokens(make_tokens(args.model, args.text, rows=args.rows, seq_len=args.seq_len, seed=args.seed), args.out)


if __name__ == "__main__":
    main()
