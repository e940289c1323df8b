"""Values of tensors that a forward asks for while it is recorded, such as how long a prompt is or which of its tokens count.

If such a tensor depends on nothing that changes during a run, its values are the same for the whole run. The recorded forward
takes them for granted, and runs only where the same questions have the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from agd_fast.engine.fingerprint import version
from agd_fast.graph.capture import NotCapturableError
from agd_fast.graph.levels import Level, in_place_groups, is_random, leading_to

REMEMBERED = 8  # sets of tensors per scope for which it is remembered whether they give the same answers
_MASKS = (torch.bool, torch.uint8)
_VALUES = (  # functions that read values
    Tensor.item,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.numpy,
    Tensor.is_nonzero,
    Tensor.equal,
    Tensor.nonzero,
    torch.is_nonzero,
    torch.nonzero,
    torch.equal,
)
_MOVES = {Level.STEP: "the step", Level.MOVING: "x_t"}


class _OfXError(NotCapturableError):
    """Values that depend on x_t were asked for. A graph may still compute with a single one, if no decision depends on it."""


@dataclass(frozen=True)
class Question:
    """What was asked for, as a function of some of the inputs (by index), and the answer at recording."""

    function: Callable[..., Tensor]
    inputs: tuple[int, ...]
    answer: Tensor

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        return self.function(*[inputs[index] for index in self.inputs])


class Asked:
    """All questions of one recording, in order. Each takes the answers to those before it for granted."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self.questions = list(questions)
        self.inputs = sorted({index for question in self.questions for index in question.inputs})
        self.answers = [_bytes(question.answer) for question in self.questions]

    def holds(self, inputs: Sequence[Tensor], store: dict[Any, Any]) -> bool:
        """Whether these inputs give the same answers. store: that of the scope."""
        return self._look(inputs, store)[0]

    def values(self, inputs: Sequence[Tensor], store: dict[Any, Any]) -> int:
        """A hash of the inputs' values, which tells inputs with other answers apart; 0 where the answers are the same."""
        return self._look(inputs, store)[1]

    def _look(self, inputs: Sequence[Tensor], store: dict[Any, Any]) -> tuple[bool, int]:
        """Both. Waits for the device, but not again for tensors that are in `store` and were not written to since."""
        given = [(inputs[index], version(inputs[index])) for index in self.inputs]
        known: list[tuple[list[tuple[Tensor, int | None]], tuple[bool, int]]] = store.setdefault(self, [])
        for tensors, found in known:
            if all(one is own and count == was is not None for (one, count), (own, was) in zip(given, tensors, strict=True)):
                return found
        pairs = zip(self.questions, self.answers, strict=True)
        if all(_bytes(question(inputs)) == answer for question, answer in pairs):
            found = (True, 0)
        else:
            found = (False, hash(tuple(_bytes(tensor) for tensor, _ in given)))
        known[:] = [*known[-REMEMBERED + 1 :], (given, found)]
        return found


class Asking(TorchFunctionMode):
    """While make_fx records a function of `inputs`, supplies the values that it asks for.

    levels: those of the inputs. Raises NotCapturableError when values are asked for that may change within a run.
    """

    def __init__(self, inputs: Sequence[Tensor], levels: Sequence[Level]) -> None:
        super().__init__()
        self.inputs, self.levels = inputs, levels
        self.questions: dict[fx.Node, Question] = {}

    def __call__(self, function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        """`function`, run inside this mode."""

        def asking(*tensors: Tensor) -> list[Tensor]:
            with self:
                return function(*tensors)

        return asking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VALUES and any(map(_has_no_value, pytree.tree_leaves((args, kwargs)))):
            try:
                return self._on_values(func, *args, **kwargs)
            except _OfXError:
                if func is not Tensor.item:
                    raise
        if func is Tensor.__getitem__:
            args = (args[0], self._numbers(args[1]))
        return func(*args, **kwargs)

    def _numbers(self, index: Any) -> Any:
        """The index with each mask replaced by the positions that it selects: a fake mask cannot tell how many these are."""
        parts = index if isinstance(index, tuple) else (index,)
        masks = [isinstance(part, FakeTensor) and part.dtype in _MASKS and part.ndim > 0 for part in parts]
        if not any(masks):
            return index
        found: list[Any] = []
        for part, is_mask in zip(parts, masks, strict=True):
            found += self._on_values(torch.nonzero, part, as_tuple=True) if is_mask else [part]
        return tuple(found)

    def _on_values(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._values, (args, kwargs))
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _values(self, tensor: Tensor) -> Tensor:
        tracer: Any = getattr(get_proxy_mode(), "tracer", None)
        slot = get_proxy_slot(tensor, tracer, None)
        if slot is None:
            raise NotCapturableError("it asks for the values of a tensor that is not recorded")
        node = slot.proxy.node
        nodes = leading_to([node])
        question = self._question(node, nodes, tracer.root)
        if any(one.op in ("placeholder", "get_attr") for one in nodes):  # the answer may change
            self.questions[node] = question
        with _disable_current_modes():
            return question.answer.clone()  # a copy: the forward may write to it

    def _question(self, asked: fx.Node, nodes: list[fx.Node], constants: Any) -> Question:
        placeholders = [node for node in asked.graph.nodes if node.op == "placeholder"]
        taken = tuple(index for index, node in enumerate(placeholders) if node in nodes)
        moves = max((self.levels[index] for index in taken), default=Level.STATIC)
        if moves != Level.STATIC:
            error = _OfXError if moves == Level.MOVING else NotCapturableError
            raise error(f"it asks for the values of a tensor that depends on {_MOVES[moves]}")
        if any(map(is_random, nodes)) or not in_place_groups(asked.graph).isdisjoint(nodes):
            raise NotCapturableError("it asks for the values of a tensor that is random or written in place")
        inner, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in nodes:
            copies[node] = inner.node_copy(node, copies.__getitem__)
        inner.output(copies[asked])
        function = fx.GraphModule(constants, inner).forward
        with _disable_current_modes():
            return Question(function, taken, function(*[self.inputs[index] for index in taken]).clone())


def _has_no_value(one: Any) -> bool:
    """Whether it is a fake tensor, other than a constant of the code."""
    return isinstance(one, FakeTensor) and one.constant is None


def _bytes(tensor: Tensor) -> bytes:
    """The tensor's values as bytes, so that NaN equals itself."""
    return tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()
