"""Run a decoder one block at a time, with one block's weights in memory.

The model's own forward decides what a block is given besides hidden states (masks, rotary tables, which differ from block to block in some
families): it is run with the embedding replaced by the hidden states at hand and every block but one passed through, and is left as soon as
that block has answered. So nothing but hidden states is kept between blocks, and no family needs a table. Where what a block is given follows
from the embedding itself (per-layer embeddings, say), the embedding stays loaded and answers, and the states go to the block alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any, Protocol

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from quantkit.errors import SourceError
from quantkit.models.architecture import Architecture, Block
from quantkit.models.given import copied, is_same, on_meta

_FEW_TOKENS = 4

Place = tuple[slice, slice]
"""Rows and columns of a [R, T] tensor."""

_UNMIXED = 1e-5
"""How far, relative to what a block adds to it, a text may move with another before it: rounding alone."""


class Weights(Protocol):
    """Dense tensors by checkpoint name, each as an unquantized file keeps it: a Conv1D's is [K, N]."""

    def __contains__(self, name: object) -> bool: ...

    def get(self, name: str) -> Tensor: ...


class _Answered(Exception):
    """Carries a block's output out of the model's forward."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class BlockRunner:
    """Forward passes through the parts of one model."""

    def __init__(self, architecture: Architecture, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.architecture, self.device, self.dtype = architecture, torch.device(device), dtype
        self._num_returned = 0  # by a block: 0 is a tensor, n a tuple of n
        self._keeps_embedding = False
        self._mixes: dict[int | None, bool] = {}
        self._differentiates = False
        architecture.model.requires_grad_(False)  # of weights; what is tuned in their place says so itself
        _move_buffers(architecture.model, self.device)

    def load(self, module_path: str, weights: Weights) -> None:
        """Give one module of the tree its weights."""
        module = self.architecture.model.get_submodule(module_path)
        for name, parameter in [*module.named_parameters(), *_persistent_buffers(module)]:
            self._set(module, name, f"{module_path}.{name}", parameter, weights)

    def unload(self, module_path: str) -> None:
        """Take the weights away again."""
        module = self.architecture.model.get_submodule(module_path)
        for name, _ in list(module.named_parameters()):
            set_module_tensor_to_device(module, name, "meta")

    def load_outside(self, weights: Weights) -> None:
        """Give weights to everything that is not a block: embeddings, norms, head. Tied parameters stay one tensor."""
        model = self.architecture.model
        inside = tuple(f"{block.path}." for block in self.architecture.blocks)
        for name, parameter in [*model.named_parameters(), *_persistent_buffers(model)]:
            if not name.startswith(inside) and self.architecture.stored.owner(name) == name:
                self._set(model, name, name, parameter, weights)
        model.tie_weights()

    def unload_outside(self) -> None:
        """Take the two large ones, token embedding and head, away again. Every block's forward goes through the rest, such as learned positions,
        and in some families through the embedding."""
        model = self.architecture.model
        for module in (None if self._keeps_embedding else model.get_input_embeddings(), model.get_output_embeddings()):
            for name, _ in list(module.named_parameters()) if module is not None else []:
                set_module_tensor_to_device(module, name, "meta")

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states [B, T, H] that enter the first block. Needs `load_outside`."""
        with self._blocks_replaced(lambda index, hidden, *_: _answer(hidden)), self._stopping() as stop:
            hidden = stop(input_ids=input_ids.to(self.device), position_ids=position_ids.to(self.device))
        if hidden.shape[:-1] != input_ids.shape:
            raise SourceError(f"{self._name} cannot be run block by block: its blocks take states of shape {list(hidden.shape)}")
        return hidden

    def block(self, index: int, hidden: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states [B, T, H] after block `index`, whose weights must be loaded."""

        def forward(at: int, passing: Tensor, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if at != index:
                return self._pass(passing)
            output = original(hidden, *args, **kwargs)
            if self._num_returned > 1 and any(more is not None for more in output[1:]):
                raise SourceError(f"{self._name} cannot be run block by block: block {index} passes on more than hidden states")
            return _answer(output[0] if isinstance(output, tuple | list) else output)

        hidden = hidden.to(self.device)
        with self._blocks_replaced(forward), self._embedding_replaced(hidden), self._stopping() as stop:
            return stop(input_ids=input_ids.to(self.device), position_ids=position_ids.to(self.device))

    def logits(self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [B, T, V] in float32 from the hidden states that leave the last block. Needs `load_outside`."""
        hidden = hidden.to(self.device)
        with self._blocks_replaced(lambda index, passing, *_: self._pass(hidden)), self._embedding_replaced(hidden):
            out = self._forward(input_ids=input_ids.to(self.device), position_ids=position_ids.to(self.device))
        return out.logits.float()

    def settle(self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor) -> None:
        """Learn once whether this family's blocks return a tensor or a tuple, and what they read beside the states that are passed on.

        That may be the embedding, which is then kept loaded; it must not be earlier states. All is tried on the first few tokens with every
        block passed through, so the blocks' weights are not needed, and what is outside must be loaded.

        Raises:
            SourceError: the family cannot be run block by block.
        """
        hidden, input_ids, position_ids = (x[:1, :_FEW_TOKENS].to(self.device) for x in (hidden, input_ids, position_ids))
        generator = torch.Generator().manual_seed(0)
        states = [torch.randn(hidden.shape, generator=generator).to(hidden) for _ in range(2)]
        fault = "pass on more than hidden states"
        for self._num_returned, self._keeps_embedding in product(range(4), (False, True)):
            try:
                first, second = (self._given(state, input_ids, position_ids) for state in states)
            except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError):
                continue
            if not all(is_passed_on for is_passed_on, _ in first):
                continue
            if len(first) == len(second) and all(is_same(a, b) for (_, a), (_, b) in zip(first, second, strict=True)):
                if any(isinstance(given, dict) for _, (args, kwargs) in first[:-1] for given in (*args, *kwargs.values())):
                    self._refuse_looking_back(hidden, input_ids, position_ids)
                return
            fault = "read more of earlier states than what is passed on"
        raise SourceError(f"{self._name} cannot be run block by block: its blocks {fault}")

    @property
    def keeps_embedding(self) -> bool:
        """Whether blocks read the embedding beside their states; known once settled."""
        return self._keeps_embedding

    def places(self, index: int | None, position_ids: Tensor, rows_at_once: int) -> list[Place]:
        """What to give block `index`, or the embedding (None), at once: a few rows, or one text where it does not keep the texts of a row apart.

        Texts begin where positions restart at 0. Whether the part keeps them apart is tried once; it must have its weights, and a block `settle`.
        """
        if bool((position_ids[:, 1:] == 0).any()):
            if index not in self._mixes:
                self._mixes[index] = self._embedding_mixes() if index is None else self._block_mixes(index, position_ids.shape[1])
            if self._mixes[index]:
                return text_places(position_ids)
        return [(slice(start, start + rows_at_once), slice(None)) for start in range(0, len(position_ids), rows_at_once)]

    def _embedding_mixes(self) -> bool:
        """Whether the same text is embedded otherwise behind another."""
        ids, positions = (torch.arange(_FEW_TOKENS).repeat(2)[None] for _ in range(2))
        first, second = self.embed(ids, positions).chunk(2, dim=1)
        return not torch.equal(first, second)

    def _block_mixes(self, index: int, length: int) -> bool:
        """Whether what a block makes of a text depends on another text before it.

        Tried on a full row, as a block may look at so many tokens that in a short one it looks at all.
        """
        config = self.architecture.config.get_text_config()
        half = max(_FEW_TOKENS, length // 2)
        positions = torch.arange(half).repeat(2)[None]
        texts = torch.randn(3, 1, half, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        ids = positions % config.vocab_size
        behind = [self.block(index, torch.cat([before, texts[2]], dim=1), ids, positions)[:, half:].float() for before in texts[:2]]
        change = (behind[0] - behind[1]).norm()
        return not bool(change <= _UNMIXED * (behind[0] - texts[2].to(behind[0])).norm())

    def _given(self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor) -> list[tuple[bool, Any]]:
        """For each call of a block: whether it is handed just the states that the one before passed on, and what else it is handed."""
        given: list[tuple[bool, Any]] = []
        passing_on: list[Tensor] = []

        def record(index: int, passing: Tensor, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            is_next = index == len(given) and passing.shape == hidden.shape
            given.append((is_next and (not passing_on or torch.equal(passing, passing_on[-1])), copied((args, kwargs))))
            passing_on.append(hidden * (index + 2))
            return self._pass(passing_on[-1])

        with self._blocks_replaced(record), self._embedding_replaced(hidden):
            out = self._forward(input_ids=input_ids, position_ids=position_ids)
        is_whole = len(given) == len(self.architecture.blocks) and out.logits.shape[:2] == hidden.shape[:2]
        return [*given, (is_whole, None)]

    def _refuse_looking_back(self, hidden: Tensor, input_ids: Tensor, position_ids: Tensor) -> None:
        """Blocks that look up in a mapping what an earlier one left there (keys and values, say) cannot be run alone. Tried without weights."""

        def look(index: int, passing: Tensor, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            try:
                original(*on_meta((passing, *args)), **on_meta(kwargs))
            except KeyError as error:
                fault = f"block {index} reads {error} of an earlier block"
                raise SourceError(f"{self._name} cannot be run block by block: {fault}") from error
            except Exception:  # what a block makes of tensors without values is no matter here
                pass
            return self._pass(passing)

        with self._blocks_replaced(look), self._embedding_replaced(hidden):
            self._forward(input_ids=input_ids, position_ids=position_ids)

    @property
    def _name(self) -> str:
        return type(self.architecture.model).__name__

    def _pass(self, hidden: Tensor) -> Any:
        return (hidden, *[None] * (self._num_returned - 1)) if self._num_returned else hidden

    def _forward(self, **inputs: Tensor) -> Any:
        with torch.set_grad_enabled(self._differentiates):
            return self.architecture.model(**inputs, use_cache=False)

    @contextmanager
    def differentiating(self) -> Iterator[None]:
        """Answers of `block` and `logits` can be differentiated by the hidden states they were given, and by what comes between."""
        self._differentiates = True
        try:
            yield
        finally:
            self._differentiates = False

    @contextmanager
    def _stopping(self) -> Iterator[Callable[..., Tensor]]:
        def run(**inputs: Tensor) -> Tensor:
            try:
                self._forward(**inputs)
            except _Answered as answer:
                return answer.output
            raise SourceError(f"{self._name} did not call its decoder blocks")

        yield run

    @contextmanager
    def _blocks_replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        modules = [block.module for block in self.architecture.blocks]
        for index, module in enumerate(modules):
            module.forward = _bound(forward, index, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    @contextmanager
    def _embedding_replaced(self, hidden: Tensor) -> Iterator[None]:
        """Let the token embedding answer with these states; what families add or scale afterwards never reaches a block.

        Only where blocks read the embedding beside their states does it answer for itself.
        """
        if self._keeps_embedding:
            yield
            return
        embedding = self.architecture.model.get_input_embeddings()
        width = getattr(embedding, "embedding_dim", hidden.shape[-1])
        answer = hidden if width == hidden.shape[-1] else hidden[..., :1].expand(*hidden.shape[:2], width)
        embedding.forward = lambda *args, **kwargs: answer.clone()  # some families scale it in place
        try:
            yield
        finally:
            del embedding.forward

    def _set(self, module: nn.Module, name: str, path: str, parameter: Tensor, weights: Weights) -> None:
        stored = self.architecture.stored
        owner = stored.owner(path)
        sources = stored.sources(owner)
        if not sources or not all(source in weights for source in sources):
            raise SourceError(f"the checkpoint has no tensor for {path} {list(parameter.shape)}")
        value = stored.read(owner, weights.get)
        if value.shape != parameter.shape:
            raise SourceError(f"{sources[0]} is {list(value.shape)} in the checkpoint; the config's model wants {list(parameter.shape)}")
        dtype = self.dtype if parameter.is_floating_point() else parameter.dtype
        set_module_tensor_to_device(module, name, self.device, value=value, dtype=dtype)


def text_places(position_ids: Tensor) -> list[Place]:
    """Every text by itself, in order."""
    places: list[Place] = []
    for row, positions in enumerate(position_ids):
        starts = [0, *((positions[1:] == 0).nonzero()[:, 0] + 1).tolist(), len(positions)]
        places += [(slice(row, row + 1), slice(*ends)) for ends in pairwise(starts)]
    return places


def decoder_linears(block: Block, model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block's linears by checkpoint name."""
    return {linear.name: model.get_submodule(linear.path) for linear in block.linears}


def _answer(output: Tensor) -> Any:
    raise _Answered(output)


def _bound(forward: Callable[..., Any], index: int, original: Callable[..., Any]) -> Callable[..., Any]:
    def bound(*args: Any, **kwargs: Any) -> Any:
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        return forward(index, hidden, original, args[1:] if args else (), kwargs)

    return bound


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    persistent = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for name, buffer in list(model.named_buffers()):
        if buffer.device != device and buffer.device.type != "meta":
            set_module_tensor_to_device(model, name, device, value=buffer)
