"""The whole of `quantkit verify`: is this checkpoint whole, consistent and what its original became?

Every check is made even where an earlier one failed, as long as it can be; a checkpoint that cannot be opened has one failed check that says why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.checkpoint.side_files import left_behind, side_files
from quantkit.checkpoint.source import resolve
from quantkit.checkpoint.weight_files import some
from quantkit.conversion.calibration import CalibrationOptions, load_calibration
from quantkit.conversion.outcome import REPORT_FILE
from quantkit.conversion.rotating import RotatedWeights
from quantkit.conversion.verification import Verification
from quantkit.conversion.verify_folds import folded_tensors, own_recipe, rotated_source, unlike_rotated
from quantkit.conversion.verify_structure import config_problems, missing_parameters
from quantkit.conversion.verify_values import examine_layers, unlike_tensors
from quantkit.errors import CheckpointError, QuantkitError, UsageError
from quantkit.formats.kv_scales import HOLDS_KV_SCALES, in_words, kv_scale_names, kv_scale_problems, kv_scheme, why_not
from quantkit.formats.opened import OpenedCheckpoint
from quantkit.formats.stored_layers import wrong_parts
from quantkit.formats.streamed import FileOrder, streamed, transposed_layers
from quantkit.models.architecture import Architecture, describe, load_config
from quantkit.models.compare import Progress, StreamedModel, TokenRows, compare
from quantkit.models.device import find_device
from quantkit.models.names import is_kv_scale
from quantkit.models.tokenizer import has_tokenizer, load_tokenizer

_ROW = 512
_SPREAD = 16
"""Rows that are laid out for each row that is measured: one long document would fill a few rows alone."""

_VALUE_CHECKS = {
    "decoding": "every layer decodes",
    "codes": "in range",
    "scales": "finite and not zero",
    "zero points": "in range",
    "groups": "in order",
}
_OWN_FILES = ("README.md", "recipe.yaml", REPORT_FILE, "quant_log.csv")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much to look at.

    Attributes:
        num_tokens: tokens for the KL divergence from the original; 0 leaves it out.
        text: what the tokens are of: a file, folder or data set as for calibration; None for the part of the built-in mix that never calibrates.
        device: "auto" takes a GPU where there is one.
    """

    num_tokens: int = 4096
    text: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.num_tokens < 0:
            raise UsageError(f"num_tokens is {self.num_tokens}; it is 0 or more")


def verify(out: str | Path, *, against: str | None = None, options: VerifyOptions | None = None, progress: Progress | None = None) -> Verification:
    """Check a checkpoint, quantized by whom it may be, and compare it with its original if that is given.

    Args:
        against: the original: folder, Hub id or "reference".
        progress: told of the layers decoded, and of the blocks streamed.

    Raises:
        UsageError: this machine has no such device.
        SourceError: there is no such model at all, or the original cannot be opened. What is wrong with the checkpoint itself is in the result.
    """
    options = options or VerifyOptions()
    device = find_device(options.device)
    folder = resolve(str(out), trust_remote_code=options.trust_remote_code).folder
    source = OpenedCheckpoint(resolve(against, trust_remote_code=options.trust_remote_code).folder) if against else None
    result = Verification(str(out), against)
    opened, architecture = _open(folder, result, options)
    if opened is None:
        return result
    if architecture is not None:
        _check_structure(opened, source, architecture, result)
    recipe = own_recipe(opened, source)
    folded = folded_tensors(recipe, architecture)
    try:
        rotated = rotated_source(recipe, source, trust_remote_code=options.trust_remote_code)
    except QuantkitError as error:
        result.add("rotation", [f"recipe.yaml asks for one: {error}"], "")
        return result
    _check_values(opened, None if folded else rotated or source, architecture, result, progress)
    if source is not None and folded:
        result.add("layer errors", [], "not compared: recipe.yaml folds scales into weights and norms; the KL divergence tells")
    if source is not None:
        if rotated is not None:
            unlike, num_alike = unlike_rotated(opened, rotated, folded)
            result.add("rotated tensors", unlike, f"{num_alike} unquantized ones are the original's, rotated as recipe.yaml says")
        _check_against(opened, source, architecture, folded | (rotated.rotation.folds.keys() if rotated else set()), result)
    _check_tokenizer(folder, source, result, options)
    if source is not None and architecture is not None and options.num_tokens:
        _check_divergence(opened, source, architecture, result, options, device, progress)
    return result


def _open(folder: Path, result: Verification, options: VerifyOptions) -> tuple[OpenedCheckpoint | None, Architecture | None]:
    try:
        opened = OpenedCheckpoint(folder)
    except QuantkitError as error:
        result.add("files", [str(error)], "")
        return None, None
    result.add("files", [], f"{len(opened.reader.names)} tensors, {opened.reader.total_bytes:,} bytes in {len(opened.reader.files)} files, all whole")
    try:
        return opened, describe(load_config(folder, trust_remote_code=options.trust_remote_code), opened, trust_remote_code=options.trust_remote_code)
    except QuantkitError as error:
        result.add("architecture", [str(error)], "")
        return opened, None


def _check_structure(opened: OpenedCheckpoint, source: OpenedCheckpoint | None, architecture: Architecture, result: Verification) -> None:
    result.add("architecture", missing_parameters(opened, architecture), f"every parameter of {type(architecture.model).__name__} is there")
    unknown = [name for name in architecture.unplaced(opened.dense_names) if source is None or name not in source]
    words = f"{len(unknown)} that the model has no place for: {', '.join(unknown[:3])}" if unknown else "no tensor too many"
    problems = [f"{name} is neither in the model nor in the original" for name in unknown] if source else []
    owners = {name: opened.schemes.get(name.rpartition(".")[0]) for name in unknown}
    problems += [f"{name} belongs to no {scheme.name} layer" for name, scheme in owners.items() if scheme is not None]
    result.add("extra tensors", problems, words)
    _check_kv_scales(opened, architecture, result)
    num_parts = sum(len(opened.parts(module)) for module in opened.schemes)
    result.add("layer tensors", wrong_parts(opened), f"{num_parts} tensors of {len(opened.schemes)} quantized layers have their types and shapes")
    result.add("config", config_problems(opened, architecture), _config_words(opened))


def _check_kv_scales(opened: OpenedCheckpoint, architecture: Architecture, result: Verification) -> None:
    scheme, names = kv_scheme(opened.reader.quantization_config), kv_scale_names(architecture)
    if scheme is None and not names:
        return
    refusal = why_not(scheme)
    problems = ([refusal] if refusal else []) + kv_scale_problems(opened, architecture)
    if not names and scheme is not None and not scheme.get("dynamic"):
        problems.append("kv_cache_scheme asks for fixed scales, and none are stored")
    words = in_words(scheme) if scheme is not None else "not asked for by the config"
    result.add("KV scales", problems, f"{words}; of {len(names)} layers" if names else words)


def _config_words(opened: OpenedCheckpoint) -> str:
    schemes = ", ".join(sorted({scheme.name for scheme in opened.schemes.values()}))
    return f"agrees with the tensors: {opened.format.name}, {schemes}" if opened.format else "the model is not quantized"


def _check_values(
    opened: OpenedCheckpoint, source: OpenedCheckpoint | RotatedWeights | None, architecture: Architecture | None, result: Verification,
    progress: Progress | None,
) -> None:  # fmt: skip
    told = (lambda done, total: progress("decoding layers", done, total)) if progress else None
    findings = examine_layers(opened, source, transposed_layers(architecture) if architecture else set(), told)
    for name, words in _VALUE_CHECKS.items():
        if opened.schemes:
            result.add(name, findings.problems[name], words)
    result.layer_errors = findings.errors
    if findings.moved:
        lossy = [name for name, is_same in findings.moved.items() if not is_same]
        words = f"{len(findings.moved) - len(lossy)} of {len(findings.moved)} layers that the original has quantized too hold its values bit for bit"
        result.add("lossless", [], words + (f"; others: {some(lossy, 3)}" if lossy else ""))
    if source is not None and (findings.errors or findings.problems["errors"]):
        result.add("layer errors", findings.problems["errors"], _error_words(findings.errors) if findings.errors else "")


def _error_words(errors: dict[str, float]) -> str:
    worst = max(errors, key=lambda name: errors[name])
    return f"||W - Q||² / ||W||² is {sum(errors.values()) / len(errors):.3g} on average, {errors[worst]:.3g} at worst ({worst})"


def _check_against(
    opened: OpenedCheckpoint, source: OpenedCheckpoint, architecture: Architecture | None, folded: set[str], result: Verification
) -> None:
    moved = _moved_kv_scales(opened, source)
    own = {name for name in source.names if is_kv_scale(name)} - moved  # of another quantization's cache; the output's are calibrated anew, or none
    absent = [f"{name} of the original is missing" for name in source.names if name not in opened and name not in own]
    words = f"all {len(source.names) - len(own)} are there, as they were or {'quantized' if opened.format else 'decoded'}"
    result.add("original's tensors", absent, words)
    unlike, num_equal = unlike_tensors(opened, FileOrder(source, architecture) if architecture else source, folded | own)
    if unlike and all("norm" in problem.split()[0] for problem in unlike):
        unlike.insert(0, "only norms differ, as after AWQ or SmoothQuant, which fold scales into them; layer errors then say nothing, and KL does")
    words = f"{num_equal} equal the original's bit for bit" + (", those that the recipe folds into are not compared" if folded else "")
    words += f", the {len(moved)} scales of its KV cache too" if moved else ""
    result.add("unquantized tensors", unlike, words)
    files = [path for path in side_files(source.reader.folder, exclude=_OWN_FILES) if not (opened.reader.folder / path).is_file()]
    behind = left_behind(source.reader.folder, weights=source.reader.files, exclude=_OWN_FILES)
    absent = [path.as_posix() for path in behind if not (opened.reader.folder / path).is_file()]
    words = "all of the original's are there" + (f", but for other weights and pickles: {some(absent, 3)}" if absent else "")
    result.add("side files", [f"{path} of the original is missing" for path in files], words)


def _moved_kv_scales(opened: OpenedCheckpoint, source: OpenedCheckpoint) -> set[str]:
    """The scales of the original's KV cache that came along with its codes: all, where a container that holds them was written without a recipe."""
    try:
        report = json.loads((opened.reader.folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    is_move = isinstance(report, dict) and report.get("recipe", "") is None
    holds = opened.format is not None and opened.format.name in HOLDS_KV_SCALES
    return {name for name in source.names if is_kv_scale(name)} if is_move and holds else set()


def _check_tokenizer(folder: Path, source: OpenedCheckpoint | None, result: Verification, options: VerifyOptions) -> None:
    if not has_tokenizer(folder):
        needed = source is not None and has_tokenizer(source.reader.folder)
        result.add("tokenizer", ["there is none, and the original has one"] if needed else [], "there is none")
        return
    try:
        size = len(load_tokenizer(folder, trust_remote_code=options.trust_remote_code))
    except QuantkitError as error:
        result.add("tokenizer", [str(error)], "")
    else:
        result.add("tokenizer", [], f"loads, {size} tokens")


def _check_divergence(
    opened: OpenedCheckpoint,
    source: OpenedCheckpoint,
    architecture: Architecture,
    result: Verification,
    options: VerifyOptions,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """KL divergence from the original; it fails where a model gives NaN or cannot be run, and is left out, said so, without a tokenizer."""
    try:
        rows = _rows(source, architecture, options)
    except QuantkitError as error:
        if options.text is not None:
            raise
        result.add("KL divergence", [], f"not measured: {error}")
        return
    try:
        result.divergence = compare(*_models(opened, source, architecture, options), rows, device=device, progress=progress)
    except (QuantkitError, RuntimeError) as error:
        result.add("KL divergence", [str(error).splitlines()[0]], "")
        return
    d = result.divergence
    words = f"{d.kl_mean:.5f} ± {d.kl_se:.5f} nats over {d.num_tokens} tokens, same top token {100 * d.top1:.2f}%, "
    result.add("KL divergence", [], words + f"perplexity {d.ppl_baseline:.4f} -> {d.ppl_quantized:.4f}")


def _rows(source: OpenedCheckpoint, architecture: Architecture, options: VerifyOptions) -> TokenRows:
    tokenizer = load_tokenizer(source.reader.folder, trust_remote_code=options.trust_remote_code)
    seq_len = min(_ROW, architecture.context)
    num_rows = -(-options.num_tokens // seq_len)
    wanted = CalibrationOptions(source=options.text, num_samples=num_rows * _SPREAD, seq_len=seq_len)
    texts = load_calibration(wanted, tokenizer, context=architecture.context, held_out=True)
    if int(texts.input_ids.max()) >= int(architecture.config.get_text_config().vocab_size):
        raise CheckpointError("the tokenizer has more tokens than the model's vocabulary")
    step = max(1, len(texts.input_ids) // num_rows)
    return TokenRows.of_texts(*(rows[::step][:num_rows] for rows in (texts.input_ids, texts.position_ids, texts.valid)))


def _models(
    opened: OpenedCheckpoint, source: OpenedCheckpoint, architecture: Architecture, options: VerifyOptions
) -> tuple[StreamedModel, StreamedModel]:
    """The original and the checkpoint."""
    config = load_config(source.reader.folder, trust_remote_code=options.trust_remote_code)
    original = describe(config, source, trust_remote_code=options.trust_remote_code)
    baseline = streamed(source, original, "the original model")
    quantized = streamed(opened, architecture, "the quantized model")
    return baseline, quantized
