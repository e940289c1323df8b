"""In how many bits activations are kept for the backward pass, by what reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from agd_fast.memory.ops.layout import BITS, GROUPS

Activations = Literal["exact", "8bit", "4bit", "recompute"]


class Packing(NamedTuple):
    """group: consecutive elements that share a scale."""

    bits: int
    group: int


@dataclass(frozen=True)
class Mode:
    """Number of bits of what is kept, by what reads it in the backward pass.

    None keeps it unrounded; this is possible for attention alone, or for everything.
    norm: x̂ of layer and RMS norms that only the norm's own input gradient reads.
    fine: what the gradient of a trainable weight, or a recomputation, reads; x̂ of group norms, and of rows shorter than
        `narrow`, whose gradient is affected by errors of x̂ as 1/√n.
    factor: factors of activation functions and of gated products.
    attention: q, k, v.
    groups: number of consecutive elements that share a scale, in 4 bits and in 8.
    smallest: number of elements below which autograd is left alone.
    recomputes: whether outputs of frozen linears are recomputed from what norms keep.
    attends_again: whether attention runs again in its backward pass; if not, autograd keeps its output too, and nothing of
        attention is rounded.
    """

    norm: int | None = None
    fine: int | None = None
    factor: int | None = None
    attention: int | None = None
    groups: tuple[int, int] = (32, 64)
    narrow: int = 256
    smallest: int = 4096
    recomputes: bool = False
    attends_again: bool = True

    def __post_init__(self) -> None:
        """Raises: ValueError for bits or groups that are not supported."""
        needed, attention = (self.norm, self.fine, self.factor), self.attention
        exact = not any((*needed, attention))
        if not exact and (any(bits not in BITS for bits in needed) or attention not in (None, *BITS)):
            raise ValueError(f"norm, fine and factor must be 4 or 8, attention these or None, or all of them None; found {self}")
        if any(group not in GROUPS for group in self.groups):
            raise ValueError(f"groups must be of {GROUPS}; found {self.groups}")

    def packing(self, bits: int | None) -> Packing:
        assert bits is not None, "exact modes pack nothing"
        return Packing(bits, self.groups[bits == 8])

    @property
    def exact(self) -> bool:
        return self.fine is None


MODES: dict[str, Mode] = {
    "exact": Mode(),
    "8bit": Mode(norm=8, fine=8, factor=8, attention=8),
    "4bit": Mode(norm=4, fine=8, factor=4, attention=8),
    "recompute": Mode(norm=4, fine=8, factor=4, attention=8, recomputes=True),
}
WITHIN_BLOCKS = replace(MODES["8bit"], attends_again=False)  # for one block at a time, in its re-run: attention ran again already


def find_mode(activations: str | Mode) -> Mode:
    """Raises: ValueError listing the known modes."""
    if isinstance(activations, Mode):
        return activations
    if activations not in MODES:
        expected = ", ".join(map(repr, get_args(Activations)))
        raise ValueError(f"activations must be one of {expected}; found {activations!r}")
    return MODES[activations]
