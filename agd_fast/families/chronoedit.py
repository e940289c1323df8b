"""ChronoEditTransformer3DModel: ChronoEdit, Wan's image-to-video model with five frames, the last of which is the edited picture.

With temporal reasoning the pipeline drops frames after some steps, so later steps are conditioned differently.
"""

from dataclasses import replace

from agd_fast.families.wan import SPECS as WAN
from agd_fast.spec import PipelineSpec

SPECS = {"ChronoEditTransformer3DModel": replace(WAN["WanTransformer3DModel"], pipeline=PipelineSpec(conditional="first"))}
