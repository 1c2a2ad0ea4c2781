"""Compares calibration sources on a real model: python evals/calibration/compare.py MODEL --source mix --source FILE --measure FILE ...

Converts MODEL once for each source and seed and prints KL(original || converted) on each measured text, with its standard error.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.conversion.calibration import CalibrationOptions, CalibrationSet, load_calibration
from quantkit.conversion.convert import convert
from quantkit.conversion.options import ConvertOptions
from quantkit.core.divergence import Divergence
from quantkit.formats.opened import OpenedCheckpoint


def measure(original: Any, converted: Any, rows: CalibrationSet) -> str:
    divergence = Divergence()
    for start in range(0, len(rows.input_ids), 8):
        ids, positions = rows.input_ids[start : start + 8], rows.position_ids[start : start + 8]
        with torch.no_grad():
            logits = [model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1] for model in (original, converted)]
        divergence.add(*logits, ids[:, 1:], positions[:, 1:] > 0)
    result = divergence.result()
    return f"{result.kl_mean:.4f} ± {result.kl_se:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--source", action="append", required=True, help="a calibration source, or 'mix' for the built-in one")
    parser.add_argument("--measure", action="append", required=True, help="a text to measure on")
    parser.add_argument("--recipe", default="w4a16-gptq")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    original, converted = (AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval() for _ in range(2))
    texts = [load_calibration(CalibrationOptions(path, num_samples=64, seq_len=256), tokenizer, context=256) for path in options.measure]
    print("| calibration | seed | " + " | ".join(Path(path).name for path in options.measure) + " |")
    print("| --- | ---: |" + " ---: |" * len(texts))
    for source in options.source:
        for seed in range(options.seeds):
            calibration = CalibrationOptions(None if source == "mix" else source, options.rows, options.seq_len, seed=seed)
            settings = ConvertOptions(recipe=options.recipe, group_size=options.group_size, calibration=calibration, measure=False)
            with tempfile.TemporaryDirectory() as folder:
                convert(options.model, Path(folder) / "converted", settings)
                opened = OpenedCheckpoint(Path(folder) / "converted")
                weights = {name: opened.get(name).float() for name in converted.state_dict() if name in opened}
                converted.load_state_dict(weights, strict=False)
            results = [measure(original, converted, text) for text in texts]
            print(f"| {Path(source).name} | {seed} | " + " | ".join(results) + " |", flush=True)


if __name__ == "__main__":
    main()
