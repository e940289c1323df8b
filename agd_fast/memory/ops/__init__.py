"""Operators `agd_fast_memory::<name>` that pack what backward needs into 4 or 8 bits, and compute gradients from it.

They are called by position. Each runs the compiled extension on CUDA if that is there, else its reference `<name>_ref` in the
same file. Results are contiguous and alias nothing; inputs that are not contiguous are copied.
"""

from agd_fast.memory.ops.affine_unpack import affine_unpack, affine_unpack_ref
from agd_fast.memory.ops.geglu_backward import geglu_backward, geglu_backward_ref
from agd_fast.memory.ops.geglu_pack import geglu_pack, geglu_pack_ref
from agd_fast.memory.ops.gelu_pack import gelu_pack, gelu_pack_ref
from agd_fast.memory.ops.layout import GROUPS
from agd_fast.memory.ops.norm_backward import norm_backward, norm_backward_ref
from agd_fast.memory.ops.norm_pack import norm_pack, norm_pack_fake, norm_pack_ref
from agd_fast.memory.ops.pack import pack, pack_fake, pack_ref
from agd_fast.memory.ops.registry import LAUNCHERS, NAMESPACE, REFERENCES
from agd_fast.memory.ops.scale_unpack import scale_unpack, scale_unpack_ref
from agd_fast.memory.ops.silu_affine_backward import silu_affine_backward, silu_affine_backward_ref
from agd_fast.memory.ops.silu_pack import silu_pack, silu_pack_ref
from agd_fast.memory.ops.swiglu_pack import swiglu_pack, swiglu_pack_ref
from agd_fast.memory.ops.unpack import unpack, unpack_ref

__all__ = [
    "GROUPS",
    "LAUNCHERS",
    "NAMESPACE",
    "REFERENCES",
    "affine_unpack",
    "affine_unpack_ref",
    "geglu_backward",
    "geglu_backward_ref",
    "geglu_pack",
    "geglu_pack_ref",
    "gelu_pack",
    "gelu_pack_ref",
    "norm_backward",
    "norm_backward_ref",
    "norm_pack",
    "norm_pack_fake",
    "norm_pack_ref",
    "pack",
    "pack_fake",
    "pack_ref",
    "scale_unpack",
    "scale_unpack_ref",
    "silu_affine_backward",
    "silu_affine_backward_ref",
    "silu_pack",
    "silu_pack_ref",
    "swiglu_pack",
    "swiglu_pack_ref",
    "unpack",
    "unpack_ref",
]
