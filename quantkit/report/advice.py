"""Which recipe and container to take for a model, on a machine, for an engine: from headers, a measured bandwidth, and losses measured before.

Sizes and KV room are what a conversion would write, exactly. Tokens a second are the limit of memory: each token of one request reads every weight
once. Losses are those of the shipped reference model (`evals/baselines/recipes.json`); other models' differ, larger ones' are mostly smaller.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from quantkit.conversion.options import ConvertOptions
from quantkit.conversion.prepare import Prepared, plan_conversion
from quantkit.conversion.recipe import list_recipes
from quantkit.conversion.targets import stored_by
from quantkit.errors import FormatError, RecipeError, UsageError, did_you_mean
from quantkit.formats.base import is_of_weights
from quantkit.formats.engine_rules import Stored
from quantkit.formats.engines import ENGINES, verdicts
from quantkit.formats.registry import CONTAINERS
from quantkit.paths import packaged
from quantkit.report.describe import Matrix, weights_read
from quantkit.report.schema import Report

Batch = Literal["1", "many"]
NEAR = 0.02
"""KL divergence in nats a token up to which a loss is taken for small: on the reference model 95% of the most likely tokens stay the same."""
MANY = 32


@dataclass(frozen=True, slots=True)
class Needs:
    """What the model is to run on, and how.

    Attributes:
        memory: bytes for weights and KV cache.
        bandwidth: bytes a second that the device reads.
        batch: one request at a time, or many.
        context: tokens that a request may hold.
        engine: which engine is to load it; None for any.
    """

    memory: int
    bandwidth: float
    batch: Batch
    context: int
    engine: str | None

    def __post_init__(self) -> None:
        names = {engine.name.lower(): engine.name for engine in ENGINES}
        if self.engine is not None:
            if self.engine.lower() not in names:
                raise UsageError(f"unknown engine {self.engine!r}; {did_you_mean(self.engine, names.values())}")
            object.__setattr__(self, "engine", names[self.engine.lower()])

    @property
    def tokens(self) -> int:
        """That the KV cache is to hold: of many requests, each is taken to be a quarter of the longest."""
        return max(self.context, MANY * self.context // 4) if self.batch == "many" else self.context


@dataclass(frozen=True, slots=True)
class Advice:
    """One way to quantize the model, or to leave it.

    Attributes:
        kv_tokens: what fits into the memory beside the weights; negative where they do not fit.
        limit: tokens a second of one request at most.
        loss: KL divergence on the reference model, nats a token; None where it was not measured.
        engines: that load it.
        why_not: what speaks against it; None where nothing does.
    """

    recipe: str | None
    container: str | None
    file_bytes: int
    kv_tokens: int
    limit: float
    loss: float | None
    is_integer: bool
    engines: tuple[str, ...]
    why_not: str | None

    def command(self, source: str) -> str | None:
        """To copy; None where there is nothing to do."""
        return None if self.recipe is None else f"quantkit convert {source} -o out -r {self.recipe} -f {self.container}"


def advise(source: str, needs: Needs, *, trust_remote_code: bool = False) -> list[Advice]:
    """Every shipped recipe in every container that holds it, and the model as it is, best first.

    First what fits and loads: of what loses little, the one that reads least a token (for many requests, one whose activations are integers before);
    then what loses more, by loss. Behind them what does not fit or load.

    Raises:
        SourceError: the model cannot be read, or is quantized already.
    """
    losses, found, prepared = _losses(), [], None
    for recipe in list_recipes():
        for name in CONTAINERS:
            try:
                prepared = plan_conversion(source, ConvertOptions(recipe=recipe.name, format=name, trust_remote_code=trust_remote_code))
            except (FormatError, RecipeError):
                continue
            found.append(_of_plan(prepared, needs, losses.get(recipe.name)))
    if prepared is None:
        raise UsageError(f"no shipped recipe can quantize {source}")
    found.append(_as_it_is(prepared, needs))
    return sorted(found, key=lambda advice: _rank(advice, needs))


def kv_bytes(prepared: Prepared) -> int:
    """Of one token, in the model's own 16 bits (or 32), with every layer attending fully."""
    text = prepared.architecture.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * dim * min(4, prepared.source.dtype.itemsize)


def _of_plan(prepared: Prepared, needs: Needs, loss: float | None) -> Advice:
    plan = prepared.plan
    assert prepared.recipe is not None
    stored = stored_by(plan, prepared.source.dtype)
    activations = [layer.scheme.activation for layer in plan.layers.values()]
    is_integer = all(each is not None and each.kind == "int" and each.outliers is None for each in activations)
    matrices = [(each.name, each.shape, each.nbytes) for each in plan.tensors if is_of_weights(each.name)]
    return _advice(prepared, needs, stored, plan.bytes_after, matrices, prepared.recipe.name, plan.format.name, loss, is_integer=is_integer)


def _as_it_is(prepared: Prepared, needs: Needs) -> Advice:
    reader = prepared.source.reader
    matrices = [(name, tuple(reader.info(name).shape), reader.info(name).nbytes) for name in reader.names]
    stored = Stored(None, model_dtype=prepared.source.dtype)
    return _advice(prepared, needs, stored, reader.total_bytes, matrices, None, None, 0.0, is_integer=False)


def _advice(
    prepared: Prepared, needs: Needs, stored: Stored, file_bytes: int, matrices: Iterable[Matrix], recipe: str | None, container: str | None,
    loss: float | None, *, is_integer: bool,
) -> Advice:  # fmt: skip
    found = verdicts(stored)
    kv_tokens = (needs.memory - file_bytes) // kv_bytes(prepared)
    wanted = needs.tokens
    refusal = next((each for each in found if each.engine == needs.engine and each.loads is not True), None)
    why_not = (
        "does not fit" if kv_tokens < 0
        else f"leaves room for {kv_tokens:,} tokens of {wanted:,}" if kv_tokens < wanted
        else f"{refusal.engine}: {refusal.reason or 'not known'}" if refusal is not None
        else None
    )  # fmt: skip
    read = weights_read(matrices, prepared.architecture.config)
    engines = tuple(each.engine for each in found if each.loads)
    return Advice(recipe, container, file_bytes, kv_tokens, needs.bandwidth / read, loss, is_integer, engines, why_not)


def _rank(advice: Advice, needs: Needs) -> tuple[bool, bool, bool, float, float]:
    loss = float("inf") if advice.loss is None else advice.loss
    is_small = loss <= NEAR
    is_slow = needs.batch == "many" and not advice.is_integer
    return advice.why_not is not None, not is_small, is_slow and is_small, -advice.limit if is_small else loss, loss


def _losses() -> dict[str, float]:
    """By recipe."""
    report = Report.read(packaged("evals") / "baselines" / "recipes.json")
    return {each.conversion.recipe: each.text.result.kl_mean for each in report.checkpoints if each.conversion is not None and each.text is not None}
