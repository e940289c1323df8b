"""Settings of an adapter."""

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
    """Kind and size of an adapter.

    kind: which adapter to use. None takes what measured best on this kind of backbone: `adapter_kind` of its spec.
        - "modulation" changes the base's own conditioning sites.
        - "gated_lora" adds low-rank terms beside the base's blocks.
        - "cross_attention" and "offset" are the paper's kinds (arXiv 2503.07274, section 4), added to the output of attention
          blocks.
        - "reference_cross_attention" and "reference_offset" are the paper's kinds with embedders at every block, as in its
          reference code. `agd_fast.convert` makes them.
        - Several kinds joined by "+" act together and share the embedding of (ω, t, c).
    hidden: width d of that embedding; for modulation, this is its rank. None takes the largest width that keeps the adapter
        within `max_fraction`, at most 320.
    max_fraction: bound on the number of parameters for hidden=None, as a fraction of the base's parameters.
    rank: rank of each gated_lora term; None takes three times `hidden`, at most 16.
    heads: number of attention heads, for cross_attention.
    blocks: the blocks to which residual adapters (all kinds but modulation) are added. None takes attention for the paper's
        kinds. For gated_lora it takes convolutions, or attention and feed-forward if the denoiser's spec names no convolutions.
    omega_features: "smooth" functions of ω, or the paper's random "fourier" features.
    identity_at_one: multiply the output by (ω − 1), so that ω = 1 is exactly the base.
    guidance_range: (lowest, highest) ω that training draws from.
    layers: names or globs of the modules to act on, out of those that `blocks` stands for; None takes all.
    sees: what the adapter is conditioned on besides ω.
    negative_prompt: the negative prompt that ∅ is the encoding of, if `distill` was given one as text.

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
        """The config as JSON-compatible values.

        Entries that were added after format 1 are left out if they have their default, so that older readers accept the result.
        """
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
