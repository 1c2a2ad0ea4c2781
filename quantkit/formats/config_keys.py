"""Keys of other tools' quantization_configs that are understood; any other may change what the stored weights mean, and is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import FormatError

_OF_TRANSFORMERS = frozenset({
    "quant_method", "bits", "group_size", "sym", "desc_act", "act_group_aware", "true_sequential", "damp_percent", "damp_auto_increment", "dataset",
    "tokenizer", "meta", "backend", "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id",
    "max_input_length", "cache_block_outputs", "modules_in_block_to_quantize", "modules_to_not_convert", "use_cuda_fp16", "use_exllama",
    "exllama_config", "disable_exllama", "version", "zero_point", "format", "checkpoint_format",
})  # fmt: skip
_OF_AUTO_ROUND = frozenset({
    "provider", "autoround_version", "data_type", "iters", "nsamples", "seqlen", "lr", "minmax_lr", "gradient_accumulate_steps", "amp",
    "lr_scheduler", "enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_torch_compile", "enable_alg_ext",
    "low_gpu_mem_usage", "low_cpu_mem_usage", "scale_dtype", "to_quant_block_names", "quant_lm_head", "not_use_best_mse", "super_bits",
    "super_group_size", "supported_types", "quant_block_list", "static_attention_granularity", "static_kv_granularity",
})  # fmt: skip
_OF_MAKING = frozenset({"mse", "gptaq", "foem", "fallback", "failsafe", "hessian", "process", "hyb_act", "smooth", "static_groups"})
"""How codes are found, which the codes no longer show."""

KNOWN: Mapping[str, frozenset[str]] = {
    "gptq": _OF_TRANSFORMERS | _OF_AUTO_ROUND | _OF_MAKING | {
        "method", "lm_head", "pack_dtype", "dynamic", "is_marlin_format", "model_name_or_path", "model_file_base_name", "quantizer",
        "offload_to_disk", "offload_to_disk_path", "pack_impl", "mock_quantization", "uri",
    },
    "gptq dynamic": _OF_MAKING | {"bits", "group_size", "sym", "desc_act", "pack_dtype", "damp_percent", "damp_auto_increment", "act_group_aware"},
    "awq": _OF_TRANSFORMERS | _OF_AUTO_ROUND | {
        "method", "lm_head", "pack_dtype", "w_bit", "q_group_size", "do_fuse", "fuse_max_seq_len", "modules_to_fuse",
    },
    "fp8": frozenset({
        "quant_method", "activation_scheme", "fmt", "weight_block_size", "modules_to_not_convert", "modules_to_convert", "ignored_layers",
        "scale_fmt", "dequantize", "expert_dtype", "kv_cache_scheme",
    }),
    "bitsandbytes": frozenset({
        "quant_method", "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
    }),
    "bitsandbytes quant_state": frozenset({
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    }),
    "compressed-tensors": frozenset({
        "quant_method", "format", "quantization_status", "version", "global_compression_ratio", "kv_cache_scheme", "ignore", "config_groups",
        "sparsity_config", "transform_config", "run_compressed", "dequantize", "use_optimized_inference", "provider",
    }),
    "compressed-tensors transform_config": frozenset({"config_groups"}),
    "compressed-tensors config group": frozenset({"targets", "format", "weights", "input_activations", "output_activations"}),
    "compressed-tensors weights": frozenset({
        "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "observer", "observer_kwargs",
        "scale_dtype", "zp_dtype",
    }),
}  # fmt: skip
"""By what they are of. Of transformers 5.24, GPTQModel 7.6, auto-round 0.16, AutoAWQ 0.2, compressed-tensors 0.20, bitsandbytes 0.50."""


def require_known(config: Mapping[str, Any], what: str) -> None:
    """Raises FormatError for a key that is not known, unless its value says that it is not used."""
    for key in sorted(config.keys() - KNOWN[what]):
        if config[key] not in (None, False, [], {}, ""):
            raise FormatError(f"{what} has the key {key!r}, which quantkit does not know; it may change what the weights mean")


def require_value(config: Mapping[str, Any], key: str, read: tuple[Any, ...], what: str) -> None:
    """Raises FormatError where the key is given and its value is none of those that are read."""
    if config.get(key) not in (None, *read):
        raise FormatError(f"{what} with {key} {config[key]!r} is not read; quantkit reads {' and '.join(map(str, read))}")
