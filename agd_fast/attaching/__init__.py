"""Attaching an adapter to a denoiser, arming it, and removing it.

A site is a forward hook plus an empty marker subclass: `module.__class__` is swapped for a subclass with the same forward, so
that torch.compile's type guard notices attaching and detaching. What the hooks need is stored in attributes of the modules,
outside parameters and submodules. The base's state dict therefore never holds an adapter key, and deepcopy and pickle carry the
adapter along. An attached adapter does nothing until it is armed by `guided`, by a wrapped pipeline or by the guider.
"""

from agd_fast.attaching.arming import GuidanceScale, armed, disabled, guided, to_omega, warn_outside
from agd_fast.attaching.attach import Model, attach, install, layout_for, spec_of, unload
from agd_fast.attaching.attachment import Attachment, attachment_of, require_attachment
from agd_fast.attaching.calling import without_negatives
from agd_fast.attaching.find import component_of, components_of, denoiser_of, uncompiled
from agd_fast.attaching.scope import scoped
from agd_fast.attaching.wrapping import guiders_of, own_call, require_known_call, share, unwrap, wrap

__all__ = [
    "Attachment",
    "GuidanceScale",
    "Model",
    "armed",
    "attach",
    "attachment_of",
    "component_of",
    "components_of",
    "denoiser_of",
    "disabled",
    "guided",
    "guiders_of",
    "install",
    "layout_for",
    "own_call",
    "require_attachment",
    "require_known_call",
    "scoped",
    "share",
    "spec_of",
    "to_omega",
    "uncompiled",
    "unload",
    "unwrap",
    "warn_outside",
    "without_negatives",
    "wrap",
]
