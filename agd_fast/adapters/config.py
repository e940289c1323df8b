"""Everything a user may choose about an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Kind = Literal["modulation", "cross_attention", "offset"]
OmegaFeatures = Literal["smooth", "fourier"]
Blocks = Literal["attention", "feed_forward"]


@dataclass(frozen=True)
class AdapterConfig:
    """What kind of adapter, and how large.

    kind: "modulation" moves the base's own conditioning sites; "cross_attention" and "offset" are the paper's,
        added to the output of attention blocks (arXiv 2503.07274, section 4).
    hidden: width d of the adapter's embedding (its rank, for modulation); None takes the largest that keeps the
        adapter within `max_fraction` of the base's parameters, 320 at most.
    max_fraction: that bound.
    heads: attention heads, for cross_attention.
    blocks: which blocks residual adapters are added to.
    omega_features: "smooth" functions of ω, or the paper's random "fourier" features.
    identity_at_one: multiply the output by (ω − 1), so that ω = 1 is exactly the base.
    guidance_range: the (lowest, highest) ω that training draws from.

    The paper's form is omega_features="fourier", identity_at_one=False.
    """

    kind: Kind = "modulation"
    hidden: int | None = None
    max_fraction: float = 0.05
    heads: int = 1
    blocks: tuple[Blocks, ...] = ("attention",)
    omega_features: OmegaFeatures = "smooth"
    identity_at_one: bool = True
    guidance_range: tuple[float, float] = (1.0, 6.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        low, high = (float(omega) for omega in self.guidance_range)
        object.__setattr__(self, "guidance_range", (low, high))
        _one_of("kind", self.kind, get_args(Kind))
        _one_of("omega_features", self.omega_features, get_args(OmegaFeatures))
        for block in self.blocks:
            _one_of("blocks", block, get_args(Blocks))
        if not self.blocks:
            raise ValueError("blocks must name at least one of 'attention', 'feed_forward'; found none")
        if not low < high:
            raise ValueError(f"guidance_range must be (low, high) with low < high, found {self.guidance_range}")
        if self.hidden is not None and self.hidden < 1:
            raise ValueError(f"hidden must be a positive integer or None, found {self.hidden}")
        if not self.max_fraction > 0:
            raise ValueError(f"max_fraction must be positive, found {self.max_fraction}")
        if self.heads < 1 or (self.hidden is not None and self.hidden % self.heads):
            raise ValueError(f"heads must divide hidden; found heads={self.heads}, hidden={self.hidden}")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "blocks": list(self.blocks), "guidance_range": list(self.guidance_range)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> AdapterConfig:
        """Raises: ValueError naming the entries that are missing or unknown."""
        names = {entry.name for entry in fields(cls)}
        if set(value) != names:
            raise ValueError(
                f"adapter entries differ: missing {sorted(names - set(value)) or 'none'}, "
                f"unknown {sorted(set(value) - names) or 'none'}"
            )
        return cls(**{**value, "blocks": tuple(value["blocks"]), "guidance_range": tuple(value["guidance_range"])})


def _one_of(name: str, found: Any, expected: tuple[str, ...]) -> None:
    if found not in expected:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, expected))}; found {found!r}")
