"""Everything a user may choose about an adapter."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from agd_fast.checking import number_range, require_whole

Kind = Literal["modulation", "gated_lora", "cross_attention", "offset", "reference_cross_attention", "reference_offset"]
OmegaFeatures = Literal["smooth", "fourier"]
Blocks = Literal["attention", "feed_forward", "convolution"]
Seen = Literal["time", "conditions"]


@dataclass(frozen=True)
class AdapterConfig:
    """What kind of adapter, and how large.

    kind: "modulation" moves the base's own conditioning sites; "gated_lora" adds low-rank terms beside its blocks;
        "cross_attention" and "offset" are the paper's, added to the output of attention blocks (arXiv 2503.07274,
        section 4); with "reference_" before them they have embedders at every block, as in its reference code: what
        `agd_fast.reference.convert` makes. Several, joined by "+", act together and share the embedding of (ω, t, c). None
        takes what measured best on the kind of backbone: its spec's `adapter_kind`.
    hidden: width d of that embedding (its rank, for modulation); None takes the largest that keeps the
        adapter within `max_fraction` of the base's parameters, 320 at most.
    max_fraction: that bound.
    rank: of each term of gated_lora; None takes three times `hidden`, 16 at most.
    heads: attention heads, for cross_attention.
    blocks: which blocks residual adapters are added to; None takes attention for the paper's kinds, and for gated_lora
        convolutions, or attention and feed-forward where the denoiser's spec names none.
    omega_features: "smooth" functions of ω, or the paper's random "fourier" features.
    identity_at_one: multiply the output by (ω − 1), so that ω = 1 is exactly the base.
    guidance_range: the (lowest, highest) ω that training draws from.
    layers: names of the modules to act on, or globs, out of those that `blocks` stands for; None takes all.
    sees: what the adapter is conditioned on beside ω.
    negative_prompt: what ∅ is the encoding of, where it is a text that `distill` was given.

    The paper's form is omega_features="fourier", identity_at_one=False.
    """

    kind: str | None = None
    hidden: int | None = None
    max_fraction: float = 0.05
    rank: int | None = None
    heads: int = 1
    blocks: tuple[Blocks, ...] | None = None
    omega_features: OmegaFeatures = "smooth"
    identity_at_one: bool = True
    guidance_range: tuple[float, float] = (1.0, 6.0)
    layers: tuple[str, ...] | None = None
    sees: tuple[Seen, ...] = ("time", "conditions")
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "layers", "sees"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "guidance_range", number_range("guidance_range", self.guidance_range))
        for kind in self.kinds:
            _one_of("kind", kind, get_args(Kind))
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kind must name each kind once, found {self.kind!r}")
        _one_of("omega_features", self.omega_features, get_args(OmegaFeatures))
        for block in self.blocks or ():
            _one_of("blocks", block, get_args(Blocks))
        if self.blocks == ():
            raise ValueError(f"blocks must name at least one of {', '.join(map(repr, get_args(Blocks)))}; found none")
        for seen in self.sees:
            _one_of("sees", seen, get_args(Seen))
        if self.layers == ():
            raise ValueError("layers must name at least one module, or be None for all; found none")
        require_whole(hidden=self.hidden, rank=self.rank, heads=self.heads)
        if not self.max_fraction > 0:
            raise ValueError(f"max_fraction must be positive, found {self.max_fraction}")
        if self.hidden is not None and self.hidden % self.heads:
            raise ValueError(f"heads must divide hidden; found heads={self.heads}, hidden={self.hidden}")

    @property
    def kinds(self) -> tuple[str, ...]:
        return () if self.kind is None else tuple(self.kind.split("+"))

    def to_dict(self) -> dict[str, Any]:
        """For JSON. What came after format 1 is left out where it has its default: older readers then take it as well."""
        value = json.loads(json.dumps(asdict(self)))
        return {name: entry for name, entry in value.items() if name not in _LATER or getattr(self, name) != _LATER[name]}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> AdapterConfig:
        """Raises: ValueError naming the entries that are missing or unknown."""
        names = {entry.name for entry in fields(cls)}
        missing, unknown = sorted(names - set(value) - set(_LATER)), sorted(set(value) - names)
        if missing or unknown:
            raise ValueError(f"adapter entries differ: missing {missing or 'none'}, unknown {unknown or 'none'}")
        return cls(**value)


_LATER = {entry.name: entry.default for entry in fields(AdapterConfig) if entry.name in ("layers", "sees", "negative_prompt")}


def _one_of(name: str, found: Any, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, expected))}; found {found!r}")
