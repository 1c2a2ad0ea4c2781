"""llama.cpp beside us: the same Llama written as GGUF, quantized by its own llama-quantize, run by its own llama-bench and llama-server.

Only for measuring: names and layout of one architecture, tokens without their text.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter, TokenType
from torch import Tensor

from quantkit.bench.engine import Throughput
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import QuantkitError, UsageError

_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """The folder of its tools."""

    tools: Path
    threads: int

    def tool(self, name: str) -> str:
        """Raises UsageError where there is no such tool."""
        path = self.tools / name
        if not path.is_file():
            raise UsageError(f"{self.tools} has no {name}; give the folder of llama.cpp's tools")
        return str(path)

    def quantize(self, source: Path, target: Path, kind: str) -> Path:
        _run([self.tool("llama-quantize"), str(source), str(target), kind, str(self.threads)])
        return target

    def prefill_and_decode(self, model: Path, num_prompt: int, num_output: int) -> tuple[float, float]:
        """Tokens a second of llama-bench: a prompt of this length, and one token after another."""
        sizes = ["-p", str(num_prompt), "-n", str(num_output), "-t", str(self.threads)]
        rows = json.loads(_run([self.tool("llama-bench"), "-m", str(model), *sizes, "-r", "2", "-o", "json"]))
        return tuple(next(row["avg_ts"] for row in rows if row["n_prompt"] == p and row["n_gen"] == n) for p, n in ((num_prompt, 0), (0, num_output)))

    def one_token(self, model: Path) -> list[str]:
        """The command that loads a model and generates one token."""
        return [self.tool("llama-bench"), "-m", str(model), "-p", "0", "-n", "1", "-r", "1", "-t", str(self.threads)]

    def throughput(self, model: Path, prompts: list[list[int]], num_output: int) -> Throughput:
        """llama-server with a slot for every request, all asked at once."""
        with self._serving(model, len(prompts), len(prompts[0]) + num_output + 8) as url, ThreadPoolExecutor(len(prompts)) as pool:

            def ask(prompt: list[int]) -> int:
                body = {"prompt": prompt, "n_predict": num_output, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
                request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=3600) as answer:
                    return int(json.load(answer)["tokens_predicted"])

            started = time.perf_counter()
            counts = list(pool.map(ask, prompts))
            seconds = time.perf_counter() - started
        if set(counts) != {num_output}:
            raise QuantkitError(f"llama-server answered {sorted(set(counts))} tokens where {num_output} were asked")
        return Throughput(len(prompts), len(prompts[0]), num_output, seconds)

    @contextmanager
    def _serving(self, model: Path, slots: int, length: int) -> Iterator[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sizes = ["-np", str(slots), "-c", str(slots * length), "-t", str(self.threads)]
        command = [self.tool("llama-server"), "-m", str(model), "--port", str(port), *sizes]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                if process.poll() is not None:
                    raise QuantkitError(f"llama-server ended with {process.returncode} before it answered")
                try:
                    with urllib.request.urlopen(f"{url}/health", timeout=2):
                        break
                except OSError:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


def write_gguf(folder: Path, target: Path) -> Path:
    """An unquantized Llama checkpoint as F16 GGUF."""
    reader = CheckpointReader(folder)
    config = reader.config
    heads, kv_heads, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    writer = GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<t{i}>" for i in range(config["vocab_size"])])
    writer.add_token_types([TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["a b"])
    for name in reader.names:
        tensor = reader.get(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _interleaved(tensor, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(_gguf_name(name), tensor.float().numpy() if tensor.ndim == 1 else tensor.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order in which llama.cpp rotates them: pairs beside each other instead of halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QuantkitError(f"{Path(command[0]).name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


