"""How each engine of the table is told to load a checkpoint: a command to copy, in data. Which ones can is said in `engines`.

Every one of them finds the container in the checkpoint's own configuration, so no command names it.
"""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from string import Template

_SHELL = {
    "quantkit": "quantkit serve $model",
    "vLLM": "vllm serve $model",
    "SGLang": "python -m sglang.launch_server --model-path $model",
    "TGI": "text-generation-launcher --model-id $model",
    "llama.cpp": "python convert_hf_to_gguf.py $model --outfile $file && llama-server -m $file",
}
_PYTHON = {
    "transformers": (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained($model)\n"
        'model = AutoModelForCausalLM.from_pretrained($model, dtype="auto", device_map="auto")'
    ),
    "GPTQModel": "from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load($model)",
}


def how_to_load(engine: str, model: str) -> tuple[str, str]:
    """What loads a model in an engine: its language, "bash" or "python", and the text.

    Args:
        model: a folder, or the name of a repository on the hub.
    """
    if engine in _SHELL:
        return "bash", Template(_SHELL[engine]).substitute(model=quote(model), file=quote(f"{Path(model).name}.gguf"))
    return "python", Template(_PYTHON[engine]).substitute(model=json.dumps(model, ensure_ascii=False))
