"""The rotation of a whole model: of its embeddings, every kind of block, and its head, each proved with random weights before anything is read."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from quantkit.core.hadamard import Hadamard
from quantkit.models.architecture import Architecture, Block
from quantkit.models.folding import Call, norm_sites, observe
from quantkit.models.rotation import DoesNotCommute, Fold, Folds, find_folds, is_same, norm_folds
from quantkit.models.streaming import BlockRunner

_TOKENS = 16
_UNLIKE_EXPERTS = 4
"""So many experts have weights of their own, which the others share: a router that errs is seen, and hundreds of experts need no memory."""
_PERIOD = 1_000_003
"""Random numbers that are repeated to fill weights: a prime, so that no two rows are alike."""


@dataclass(frozen=True, eq=False, slots=True)
class Rotated:
    """Everything that a rotation of the hidden states changes.

    Attributes:
        folds: by the parameter's path in the model.
        width: of the hidden states.
        heads: sizes of the heads that are rotated, by the path of the attention's output.
    """

    folds: Folds
    width: int
    heads: dict[str, int]


def rotate(architecture: Architecture, *, seed: int, with_heads: bool) -> Rotated:
    """Find and prove every fold. The largest block is in memory twice, with random weights; the model is on the meta device again afterwards.

    Args:
        with_heads: rotate the heads between values and the attention's output too, where there are any.

    Raises:
        DoesNotCommute: which part does not, by its path.
        SourceError: the model cannot be run block by block.
    """
    return _Probe(architecture, Hadamard(int(architecture.config.get_text_config().hidden_size), seed)).rotate(with_heads)


class _Probe:
    """A model with random weights, a block at a time."""

    def __init__(self, architecture: Architecture, rotation: Hadamard) -> None:
        self.architecture, self.model, self.rotation = architecture, architecture.model, rotation
        self.runner = BlockRunner(architecture)
        self.random = torch.Generator().manual_seed(0)
        self.base = torch.randn(_PERIOD, generator=self.random)
        vocabulary = int(architecture.config.get_text_config().vocab_size)
        self.ids = (torch.arange(_TOKENS) % vocabulary)[None]
        self.positions = torch.arange(_TOKENS)[None]
        self.hidden = torch.randn(1, _TOKENS, rotation.size, generator=self.random)

    def rotate(self, with_heads: bool) -> Rotated:
        with self._outside(), self._echoing_head():
            self.runner.settle(self.hidden, self.ids, self.positions)
            folds = self._embeddings() | self._head()
            kinds: dict[Hashable, Folds] = {}
            for index, block in enumerate(self.architecture.blocks):
                if block.kind not in kinds:
                    kinds[block.kind] = self._block(index, block, with_heads)
                folds |= {f"{block.path}.{name}": _within(block.path, fold) for name, fold in kinds[block.kind].items()}
        turned = {name: fold.inputs for name, fold in folds.items() if fold.outputs is not None}
        heads = {name.removesuffix(".weight"): rotation.size for name, rotation in turned.items() if rotation is not None}
        return Rotated(folds, self.rotation.size, heads)

    def _block(self, index: int, block: Block, with_heads: bool) -> Folds:
        self._fill(block.path)

        def run(hidden: Tensor) -> Tensor:
            return self.runner.block(index, hidden, self.ids, self.positions)

        try:
            return find_folds(block.module, self.hidden, run, self.rotation, with_heads=with_heads)
        except DoesNotCommute as error:
            raise DoesNotCommute(f"{block.path}: {error}") from error
        finally:
            self.runner.unload(block.path)

    def _embeddings(self) -> Folds:
        """Every table of embeddings that is read before the first block, if what enters that is rotated when they are."""
        tables = {path: module for path, module in self.model.named_modules() if isinstance(module, nn.Embedding) and not self._is_inside(path)}
        embedding = self.model.get_input_embeddings()
        name = next((path for path, module in tables.items() if module is embedding), None)
        if name is None or self.runner.keeps_embedding:
            raise DoesNotCommute(f"the token embedding, a {type(embedding).__name__}, is read by more than the first block")
        given, rows = embedding(self.ids), embedding.weight[self.ids[0]][None]
        states = self.runner.embed(self.ids, self.positions)
        read: set[nn.Module] = set()

        def turn(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if output.shape[-1] != self.rotation.size:
                return output
            read.add(module)
            return self.rotation.turn(output)

        handles = [table.register_forward_hook(turn) for table in tables.values()]
        try:
            turned = self.runner.embed(self.ids, self.positions)
        finally:
            for handle in handles:
                handle.remove()
        is_plain = is_same((given * rows).sum() / rows.square().sum() * rows, given)
        if not is_plain or not is_same(turned, self.rotation.turn(states)):
            raise DoesNotCommute(f"{name} does not become the hidden states as it is, but for a number")
        return {f"{path}.weight": Fold(self.rotation) for path, table in tables.items() if table in read}

    def _head(self) -> Folds:
        """The last norm and the head, whose output must stay the same."""
        path = next((path for path, module in self.model.named_modules() if module is self.model.get_output_embeddings()), "")
        calls = self._on_the_way_to_the_head(self.hidden)
        sites = [site for site in norm_sites(calls, []) if path in site.readers and torch.equal(calls[site.source].x, self.hidden)]
        if not sites or not isinstance(self.model.get_output_embeddings(), nn.Linear):
            raise DoesNotCommute(f"the head {path} does not read the last hidden states behind a norm with gains")
        (site,) = sites
        folds = norm_folds(calls, site.source, site.readers, site.offset, self.rotation)
        norm = self.model.get_submodule(site.source)
        gain, norm.weight.data = norm.weight.data + site.offset, torch.full_like(norm.weight.data, 1 - site.offset)
        turned = self._on_the_way_to_the_head(self.rotation.turn(self.hidden))
        norm.weight.data = gain - site.offset
        if not is_same(self.rotation.turn_back(turned[path].x) * gain, calls[path].x):
            raise DoesNotCommute(f"the head {path} is given other states than the rotated ones")
        return folds

    def _on_the_way_to_the_head(self, hidden: Tensor) -> dict[str, Call]:
        return observe(self.model, lambda: self.runner.logits(hidden, self.ids, self.positions))[0]

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """Random weights for all that is in no block; the token embedding's rows overlap, so that they take no memory."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        outside = [path for path, _ in self.model.named_modules() if not self._is_inside(path)]
        try:
            for path in outside:
                module = self.model.get_submodule(path)
                if module is embedding and isinstance(embedding, nn.Embedding):
                    rows, columns = embedding.weight.shape
                    numbers = self._numbers((rows + columns,))
                    embedding.weight = nn.Parameter(numbers.as_strided((rows, columns), (1, 1)), requires_grad=False)
                elif module is not head:
                    self._fill(path, recurse=False)
            yield
        finally:
            for path in outside:
                for name, _ in list(self.model.get_submodule(path).named_parameters(recurse=False)):
                    set_module_tensor_to_device(self.model.get_submodule(path), name, "meta")

    @contextmanager
    def _echoing_head(self) -> Iterator[None]:
        """The head gives what it is given: its weights are not needed."""
        head = self.model.get_output_embeddings()
        head.forward = lambda x: x
        try:
            yield
        finally:
            del head.forward

    def _is_inside(self, path: str) -> bool:
        return any(f"{path}.".startswith(f"{block.path}.") for block in self.architecture.blocks)

    def _fill(self, path: str, *, recurse: bool = True) -> None:
        module = self.model.get_submodule(path)
        made: dict[str, Tensor] = {}
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            kind = re.sub(r"(?<=experts\.)\d+", lambda number: str(int(number[0]) % _UNLIKE_EXPERTS), name)
            if kind not in made:
                made[kind] = self._values(tuple(parameter.shape))
            set_module_tensor_to_device(module, name, "cpu", value=made[kind])

    def _values(self, shape: tuple[int, ...]) -> Tensor:
        """Matrices that keep the size of what they multiply; gains and biases about 1."""
        numbers = self._numbers(shape)
        return numbers * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.3 * numbers

    def _numbers(self, shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        start = int(torch.randint(_PERIOD, (), generator=self.random))
        first = self.base[start : start + count]
        return torch.cat([first, self.base.repeat(-(-(count - len(first)) // _PERIOD))])[:count].view(shape)


def _within(path: str, fold: Fold) -> Fold:
    return fold if fold.gain is None else replace(fold, gain=f"{path}.{fold.gain}")
