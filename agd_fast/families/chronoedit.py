"""ChronoEditTransformer3DModel: ChronoEdit, Wan's image to video of five frames, of which the last is the picture as edited.

With temporal reasoning the pipeline drops frames after some steps, so that later ones are conditioned otherwise.
"""

from dataclasses import replace

from agd_fast.families.wan import SPECS as WAN
from agd_fast.spec import PipelineSpec

SPECS = {"ChronoEditTransformer3DModel": replace(WAN["WanTransformer3DModel"], pipeline=PipelineSpec(conditional="first"))}
