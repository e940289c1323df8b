"""A picture of where an adapter stands: the same noise without guidance, with CFG and with AGD."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from diffusers.utils import make_image_grid
from diffusers.utils.pil_utils import pt_to_pil
from PIL import Image

from agd_fast.attaching import attachment_of, components_of
from agd_fast.distillation.tiling import DECODERS
from agd_fast.pipelines import ARMS, Arm, PipelineTeacher
from agd_fast.sampling import sample
from agd_fast.teacher import Conditions, Teacher

COLUMNS = 4


def preview(teacher: Teacher, table: Conditions, omega: float, steps: int, seed: int) -> Image.Image | None:
    """Rows: unguided, two passes, one pass; a column per condition. None if samples are not pictures (latents without a VAE)."""
    scale = omega - teacher.spec.omega_offset
    if isinstance(teacher, PipelineTeacher):
        count = min(COLUMNS, len(teacher))
        made = (pictures(teacher, arm, scale, steps, seed, count) for arm in ARMS)
    elif teacher.sample_shape[0] in (1, 3) and len(teacher.sample_shape) == 3:
        made = (_of_teacher(teacher, table, arm, scale, steps, seed) for arm in ARMS)
    else:
        return None
    rows = [*takewhile(bool, made)]  # one run shows that a pipeline makes no pictures
    return grid_of(rows) if len(rows) == len(ARMS) else None


def grid_of(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures, each in a cell of the largest one's size."""
    images = [image for row in rows for image in row]
    width, height = (max(sizes) for sizes in zip(*(image.size for image in images), strict=True))
    cells = [image.crop((0, 0, width, height)) for image in images]  # black where an image ends
    return make_image_grid(cells, rows=len(rows), cols=len(rows[0]))


def _of_teacher(teacher: Teacher, table: Conditions, arm: Arm, scale: float, steps: int, seed: int) -> list[Image.Image]:
    conditions = {name: value[:COLUMNS] for name, value in table.items()}
    images = sample(teacher, conditions=conditions, guidance_scale=scale, steps=steps, method=arm, seed=seed)
    edge = max(1, 96 // images.shape[-1])  # enlarges small ones enough to be seen
    return pt_to_pil(images.float().repeat_interleave(edge, -1).repeat_interleave(edge, -2).cpu())


def pictures(teacher: PipelineTeacher, arm: Arm, scale: float, steps: int, seed: int, count: int) -> list[Image.Image]:
    """The pipeline's pictures of its first `count` inputs; none where it makes no pictures or a denoiser lacks its adapter.

    scale: in the family's own convention.
    """
    components = components_of(teacher.pipe, teacher.spec).values()
    without_decoder = any(getattr(teacher.pipe, name, True) is None for name in DECODERS)
    if without_decoder or not all(map(attachment_of, components)):
        return []
    found: list[Image.Image] = []
    for row in range(count):  # one by one: there is memory for one sample
        made = teacher.runs.generate([row], arm, scale, steps, [seed + row])
        if not made:
            return []
        found += made
    return found
