"""An adapter for one denoiser: embedders of (ω, t, c) that its parts share, and a part for each kind that its config names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from torch import Tensor, nn

from agd_fast.adapters.base import Ahead, Context, Part, Prepared, SiteAdapter, with_tokens
from agd_fast.adapters.calibration import Calibration
from agd_fast.adapters.config import AdapterConfig
from agd_fast.adapters.cross_attention import CrossAttention
from agd_fast.adapters.gated_lora import GatedLora
from agd_fast.adapters.modulation import Modulation
from agd_fast.adapters.offset import Offset
from agd_fast.adapters.reference import ReferenceCrossAttention, ReferenceOffset
from agd_fast.conditioning import Conditioning, check_masks
from agd_fast.files import fingerprint
from agd_fast.sites import Layout

PARTS: dict[str, type[Part]] = {
    "modulation": Modulation,
    "gated_lora": GatedLora,
    "cross_attention": CrossAttention,
    "offset": Offset,
    "reference_cross_attention": ReferenceCrossAttention,
    "reference_offset": ReferenceOffset,
}


class Adapter(nn.Module):
    """An adapter for all sites of one denoiser, initialized to zero.

    calibration: maps the ω that the adapter is armed with to the one that it is evaluated at; None leaves it as it is.
    """

    def __init__(self, config: AdapterConfig, layout: Layout) -> None:
        super().__init__()
        if config.hidden is None:
            raise ValueError("expected an AdapterConfig with a resolved `hidden`, found None")
        self.config, self.layout = config, layout
        shared = any(PARTS[kind].uses_tokens for kind in config.kinds)
        self.conditioning = Conditioning(config, layout, config.hidden) if shared else None
        self.parts = nn.ModuleDict({kind: PARTS[kind](config, layout.sites[kind], layout) for kind in config.kinds})
        self.calibration: Calibration | None = None

    @property
    def sites(self) -> Iterator[SiteAdapter]:
        """What meets the tokens at each site, part by part."""
        return (site for part in self.parts.values() for site in part.sites)  # type: ignore[union-attr]

    @property
    def hash(self) -> str:
        """A hash that tells its predictions from those of any other adapter with its config."""
        calibration = {} if self.calibration is None else dict(self.calibration.named_buffers(prefix="calibration"))
        return fingerprint({**self.state_dict(), **calibration})

    def calibrate(self, calibration: Calibration | None) -> None:
        """Set a calibration, on the device of the weights, or remove it."""
        self.calibration = None if calibration is None else calibration.to(next(self.parameters()).device)

    def prepare(
        self,
        omega: Tensor,
        time: Tensor,
        conditions: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        *,
        gate: Tensor | None = None,
        ahead: Ahead | None = None,
    ) -> Prepared:
        """ω [B], e_t [B, D_t], e_c [B, D_c] or [B, L, D_c] → one entry per site, in the adapter's own dtype.

        masks: [B, L] bool by condition, True at the tokens that count; without one, all tokens of a condition count.
        gate: [1] or [B], a factor on all that the adapter contributes; 0 is the base.
        ahead: given if the entries are made before the first step rather than in the step.
        Nothing here sees x_t: it can be computed for a whole schedule before the first step.
        Raises: ValueError when a mask does not belong to its condition.
        """
        masks = masks or {}
        check_masks(masks, conditions)
        dtype = next(self.parameters()).dtype
        omega, time = omega.to(dtype), time.to(dtype)
        conditions = {name: value.to(dtype) for name, value in conditions.items()}
        gain = omega - 1 if self.config.identity_at_one else None
        if gate is not None:
            gain = gate.to(dtype).expand_as(omega) if gain is None else gain * gate.to(dtype)
        context = Context(omega, time, conditions, masks, gain, ahead)
        if self.conditioning is not None:
            context = with_tokens(context, self.conditioning, omega)
        return tuple(chain.from_iterable(part(context) for part in self.parts.values()))
