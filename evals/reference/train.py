"""Train the reference model: a small Llama with grouped-query attention, on a CPU or a GPU, resumable. Run from the repository's root:

    python -m evals.reference.train --out RUN --data TEXTS --minutes 80                  # start, or go on from RUN's last checkpoint
    python -m evals.reference.train --out RUN --data TEXTS --minutes 45 --context 1024 --rows 3 --decay   # last part: rate to zero, then export

Warm-up, stable, decay: a run goes on for as long as there is time and is finished by one decay run. Matrices are trained with Muon,
everything else with AdamW. The log is JSON lines; letter accuracy on questions drawn from another seed is logged every few minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from . import scoring
from .corpus import Batch, Mixture, Stream
from .generator import question
from .generator.documents import LETTER_WEIGHT, TEXT_WEIGHT
from .hints import looks_losses, residual_stream, says_losses
from .optimizer import Muon
from .tokenizer import SPECIAL, load_or_train_tokenizer

MATRIX_RATE, OTHER_RATE, WARM_UP_STEPS = 0.005, 0.001, 20
WATCHED_SEED = 4_000_001
WATCHED = {"letter_loss": LETTER_WEIGHT, "text_loss": TEXT_WEIGHT}


@dataclass(frozen=True)
class Settings:
    """What one run is given; see the command's help."""

    out: Path
    data: Path | None
    init: Path | None
    minutes: float
    context: int
    rows: int
    rate: float
    decay: bool
    mixture: Mixture
    aids: float
    hints: float
    watch_minutes: float
    device: str
    compile: bool


def architecture(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


class Trainer:
    """Model, optimizers and counters of one run; `save` and `load` are its checkpoint, which stays outside the repository."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = load_or_train_tokenizer(settings.out, init=settings.init, data=settings.data)
        self.model = self._model().to(settings.device)
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        chosen = set(map(id, matrices))
        self.muon = Muon(matrices, lr=MATRIX_RATE)
        self.adam = torch.optim.AdamW([p for p in self.model.parameters() if id(p) not in chosen], lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.trunk = torch.compile(residual_stream) if settings.compile else residual_stream
        self.step = self.tokens = 0
        self.minutes = 0.0
        self.checkpoint = settings.out / "state.pt"
        if self.checkpoint.exists():
            self.load()

    def _model(self) -> LlamaForCausalLM:
        if self.settings.init:
            return LlamaForCausalLM.from_pretrained(self.settings.init, dtype=torch.float32)
        return LlamaForCausalLM(architecture(len(self.tokenizer)))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "minutes": self.minutes,
        }
        new = self.checkpoint.with_suffix(".new")
        torch.save(state, new)
        new.replace(self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.settings.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.step, self.tokens, self.minutes = state["step"], state["tokens"], state["minutes"]

    def set_rate(self, scale: float) -> None:
        self.muon.param_groups[0]["lr"] = MATRIX_RATE * scale
        self.adam.param_groups[0]["lr"] = OTHER_RATE * scale

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted mean over the tokens that count (only those reach the vocabulary's matrix) plus the hints; and the losses worth watching."""
        counted = batch.weights[:, 1:] > 0
        with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16):
            depths = self.trunk(self.model, batch.ids[:, :-1])
            logits = self.model.lm_head(self.model.model.norm(depths[-1][counted]))
            told = {**says_losses(self.model, depths, batch.says), **looks_losses(self.model, depths, batch.looks)} if self.settings.hints else {}
        each = torch.nn.functional.cross_entropy(logits.float(), batch.ids[:, 1:][counted], reduction="none")
        weight = batch.weights[:, 1:][counted]
        loss = (each * weight).sum() / weight.sum() + self.settings.hints * sum(losses.mean() for losses in told.values())
        return loss, {**{name: each[weight == w] for name, w in WATCHED.items()}, **told}

    def update(self, batch: Batch) -> dict[str, list[float]]:
        loss, watched = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step()
        self.adam.step()
        self.model.zero_grad(set_to_none=True)
        self.step, self.tokens = self.step + 1, self.tokens + batch.ids.numel()
        value = loss.item()
        if not math.isfinite(value):
            raise RuntimeError(f"loss is {value} at step {self.step}")
        return {"loss": [value], **{name: each.tolist() for name, each in watched.items()}}

    def watch(self, count: int = 240) -> dict[str, object]:
        """Letter accuracy on unseen questions, the sign that answers are bound to letters."""
        rng = random.Random(WATCHED_SEED)
        items, examples = [question(rng) for _ in range(count)], [question(rng) for _ in range(count)]
        zero, subjects = scoring.question_accuracy(self.model, self.tokenizer, items, examples=[], shots=0)
        three, _ = scoring.question_accuracy(self.model, self.tokenizer, items, examples=examples, shots=3)
        return {"letters_0shot": round(zero, 3), "letters_3shot": round(three, 3), "subjects": {k: round(v, 2) for k, v in subjects.items()}}

    def export(self) -> None:
        self.model.generation_config.eos_token_id = [self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids(SPECIAL[-1])]
        self.model.to(torch.bfloat16).save_pretrained(self.settings.out / "model")
        self.tokenizer.save_pretrained(self.settings.out / "model")


def train(settings: Settings) -> None:
    trainer = Trainer(settings)
    stream = Stream(
        trainer.tokenizer,
        settings.data,
        settings.mixture,
        context=settings.context,
        seed=1_000_003 * (trainer.step + 1),
        aids=settings.aids,
    )
    log = (settings.out / "log.jsonl").open("a", encoding="utf-8")

    def report(row: dict[str, object]) -> None:
        print(json.dumps(row), flush=True)
        log.write(json.dumps(row) + "\n")
        log.flush()

    began = shown_at = watched_at = time.time()
    limit, before, first_step, shown_tokens, losses = settings.minutes * 60, trainer.minutes, trainer.step, trainer.tokens, []
    while (spent := time.time() - began) < limit:
        scale = settings.rate * min(1.0, (trainer.step - first_step + 1) / WARM_UP_STEPS) * (1 - spent / limit if settings.decay else 1.0)
        trainer.set_rate(scale)
        losses.append(trainer.update(stream.batch(settings.rows).to(settings.device)))
        trainer.minutes = before + (time.time() - began) / 60
        if (now := time.time()) - shown_at > 20:
            speed = (trainer.tokens - shown_tokens) / (now - shown_at)
            report(
                {
                    "step": trainer.step,
                    "tokens": trainer.tokens,
                    "minutes": round(trainer.minutes, 2),
                    **_means(losses),
                    "rate": round(scale, 4),
                    "context": settings.context,
                    "tokens_per_s": round(speed),
                }
            )
            trainer.save()
            shown_at, shown_tokens, losses = now, trainer.tokens, []
        if now - watched_at > 60 * settings.watch_minutes:
            report({"step": trainer.step, **trainer.watch()})
            watched_at = shown_at = time.time()
    trainer.save()
    report({"step": trainer.step, **trainer.watch()})
    if settings.decay:
        trainer.export()


def _means(losses: list[dict[str, list[float]]]) -> dict[str, float]:
    """Mean of each named loss. Letters at chance have a loss of 1.386."""
    names = dict.fromkeys(name for each in losses for name in each)
    joined = {name: [value for each in losses for value in each.get(name, [])] for name in names}
    return {name: round(sum(values) / len(values), 4) for name, values in joined.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log and exported model")
    parser.add_argument("--data", type=Path, help="folder of .txt and .utf8 texts; without it, all prose is generated")
    parser.add_argument("--init", type=Path, help="start from this exported model and its tokenizer")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--decay", action="store_true", help="bring the learning rate to zero over this run, then export")
    parser.add_argument("--mixture", type=Mixture.parse, default=Mixture(), help="shares that replace the defaults, as questions=0.6,texts=0.1")
    parser.add_argument("--aids", type=float, default=0.1, help="share of question documents that give the answer's text before its letter")
    parser.add_argument("--hints", type=float, default=1.0, help="weight of the loss of what early layers should know about a question")
    parser.add_argument("--watch-minutes", type=float, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="faster after a minute of compiling")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    given = vars(args)
    del given["threads"]
    train(Settings(**given))


if __name__ == "__main__":
    main()
