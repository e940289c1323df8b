"""Small teachers of real images, trained by the bench: conditioned on class numbers (DiT) or captions (UNet)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from agd_fast.adapters import count_parameters
from agd_fast.datasets import digits_teacher
from agd_fast.datasets.digits import ASSETS
from agd_fast.distillation.checkpoint import CHECKPOINT_NAME
from agd_fast.environment import environment
from agd_fast.evaluation import Reference, frechet_distance
from agd_fast.files import read_json, read_tensors, replacing, write_json, write_tensors
from agd_fast.teacher import Teacher
from quality.captions import CaptionEncoder, ClassLabels
from quality.classifier import classifier_record, ensure_classifier, features_of, load_reference
from quality.data import ImageData, load_data
from quality.inception import load_inception
from quality.training import Recipe, train_denoiser

TEACHERS = Path(__file__).parent.parent / "teachers"
SMOKES, SMOKE_IMAGES = Path("runs/smoke"), 64
MODELS = {"dit": DiTTransformer2DModel, "unet": UNet2DConditionModel}
CAPTIONS_NAME, TEACHER_NAME = "captions.safetensors", "teacher.json"

_UNET = {"attention_head_dim": 4, "norm_num_groups": 8}
RECIPES: dict[tuple[str, int], Recipe] = {
    # cross-attention at 4×4 only: at 8×8 it would double the time of a forward
    ("unet", 8): Recipe(
        config={
            **_UNET,
            "layers_per_block": 1,
            "block_out_channels": (24, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
        },
        batch=128,
        steps=400,  # with more the unguided samples get so good that guidance has little to repair
        learning_rate=1e-3,
        ema_decay=0.998,
        decay=0.0,
        label_noise=0.2,
        bf16=False,
    ),
    # photographs shrunk for a CPU: training took 95 minutes on two cores with bf16, shared with other work
    ("unet", 16): Recipe(
        config={
            **_UNET,
            "layers_per_block": 1,
            "block_out_channels": (32, 64, 96),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 64,
        },
        batch=128,
        steps=8_000,
        learning_rate=1e-3,
        ema_decay=0.9995,
        minutes=600.0,
        warmup=200,
    ),
    ("dit", 32): Recipe(
        config={"num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 9, "patch_size": 2},
        batch=512,
        steps=30_000,
        learning_rate=8e-4,
        ema_decay=0.9995,
        warmup=500,
    ),
    ("unet", 32): Recipe(
        config={
            **_UNET,
            "layers_per_block": 1,
            "block_out_channels": (64, 128, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 128,
        },
        batch=512,
        steps=30_000,
        learning_rate=8e-4,
        ema_decay=0.9995,
        warmup=500,
    ),
}
# what --smoke changes in the configs above
TINY: dict[tuple[str, int], dict[str, Any]] = {
    ("unet", 8): {"block_out_channels": (8, 16), "cross_attention_dim": 16},
    ("unet", 16): {"block_out_channels": (8, 16, 16), "cross_attention_dim": 16},
    ("dit", 32): {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 4},
    ("unet", 32): {"block_out_channels": (8, 16, 16), "cross_attention_dim": 16},
}


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def build(model: str, data: ImageData, recipe: Recipe) -> tuple[nn.Module, ClassLabels | CaptionEncoder]:
    """A freshly initialised denoiser of the data's shape, and the module that turns classes into its conditions."""
    torch.manual_seed(recipe.seed)
    channels, size, _ = data.shape
    if model == "dit":
        classes = len(data.class_names)
        denoiser = DiTTransformer2DModel(in_channels=channels, sample_size=size, num_embeds_ada_norm=classes, **recipe.config)
        return denoiser, ClassLabels(classes)
    denoiser = UNet2DConditionModel(in_channels=channels, out_channels=channels, sample_size=size, **recipe.config)
    return denoiser, CaptionEncoder(data.templates, data.class_names, recipe.config["cross_attention_dim"])


@dataclass(frozen=True)
class BenchTeacher:
    """A teacher, and what distilling it and measuring the result need.

    table: the conditions to distil, batch first; row_labels: their classes.
    held_out: both for the template that is kept from distillation; None without captions.
    data, reference, floor (Fréchet distance of two sets of real images): None when the data were not given.
    record: what teacher.json says. inception, inception_floor: like reference and floor, if Inception's weights were given.
    """

    teacher: Teacher
    table: dict[str, Tensor]
    row_labels: Tensor
    held_out: tuple[dict[str, Tensor], Tensor] | None
    data: ImageData | None
    reference: Reference | None
    floor: float | None
    record: dict[str, Any]
    inception: Reference | None = None
    inception_floor: float | None = None


def save_teacher(
    directory: Path, denoiser: Any, scheduler: DDIMScheduler, tables: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Saves a diffusers denoiser and everything else in float16; teacher.json is written last and marks the rest as complete."""
    with tempfile.TemporaryDirectory() as name:
        denoiser.half().save_pretrained(name)
        scheduler.save_pretrained(name)
        for file in Path(name).iterdir():
            with replacing(directory / file.name) as partial:
                shutil.copyfile(file, partial)
    if tables:
        write_tensors(directory / CAPTIONS_NAME, {name: table.half() for name, table in tables.items()})
    write_json(directory / TEACHER_NAME, dict(record))


def load_teacher(
    directory: Path | str,
    data: ImageData | None = None,
    device: torch.device | str = "cpu",
    inception: Path | None = None,
) -> BenchTeacher:
    """A finished teacher, in float32.

    data: what it was trained on; the digits need not be given. inception: file of its weights, to measure in its features too.
    Raises: FileNotFoundError when the teacher is not finished, ValueError for other data than its own.
    """
    directory = Path(directory)
    if not (directory / TEACHER_NAME).is_file():
        raise FileNotFoundError(
            f"expected a finished teacher in {directory}, found no {TEACHER_NAME}; make it with bench/fidelity.py teacher"
        )
    record = read_json(directory / TEACHER_NAME)
    if data is None and record["data"] == "digits":
        data = load_data("digits")
    if data is not None and data.name != record["data"]:
        raise ValueError(f"{directory} was trained on {record['data']}, found the data {data.name}")
    denoiser = MODELS[record["model"]].from_pretrained(directory, torch_dtype=torch.float32).to(device)
    scheduler = DDIMScheduler.from_pretrained(directory)
    classes = torch.arange(len(record["classes"]))
    null: dict[str, Tensor] = {}
    if (directory / CAPTIONS_NAME).is_file():
        captions = {name: table.float() for name, table in read_tensors(directory / CAPTIONS_NAME)[0].items()}
        null = {"encoder_hidden_states": captions["null"].to(device)}
        *distilled, unseen = captions["captions"]  # each [K, L, D]
        table = {"encoder_hidden_states": torch.cat(distilled)}
        row_labels = classes.repeat(len(distilled))
        held_out = ({"encoder_hidden_states": unseen}, classes)
    else:
        table, row_labels, held_out = {"class_labels": classes}, classes, None
    teacher = Teacher(denoiser, scheduler, null_condition=null, name=directory.name)
    reference = None if data is None else load_reference(data, directory.parent, device)
    floor = None if data is None or reference is None else real_distance(data, reference)
    bench = BenchTeacher(teacher, table, row_labels, held_out, data, reference, floor, record)
    if inception is None or data is None:
        return bench
    features = load_inception(inception, data.real[0], device)
    return replace(bench, inception=features, inception_floor=real_distance(data, features))


def real_distance(data: ImageData, reference: Reference) -> float:
    """The Fréchet distance of two disjoint sets of real images: the floor of what samples can reach."""
    first, second = (features_of(reference, images) for images in data.real)
    return frechet_distance(first, second)


def make_teacher(
    name_or_path: str,
    model: str,
    output: Path | None = None,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    limit: int | None = None,
    size: int | None = None,
    smoke: bool = False,
    device: torch.device | str | None = None,
) -> Path:
    """Train a teacher, and the classifier of its data if there is none, into a folder; a finished teacher is left as it is.

    minutes, steps: override the recipe's. limit: images of each half of the data.
    size: shrink photographs to that side.
    smoke: a tiny denoiser for a few steps, to see that everything runs. device: None takes the GPU where there is one.
    Raises: ValueError when no recipe fits the data.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    data = load_data(name_or_path, SMOKE_IMAGES if smoke and limit is None else limit, size)
    directory = output or (SMOKES if smoke else TEACHERS) / f"{data.name}-{model}"
    if (directory / TEACHER_NAME).is_file():
        print(f"{directory} is finished; remove it to train anew")
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    epochs = 1 if smoke else 30 if size is None else 10  # shrunk images are for a CPU
    ensure_classifier(data, directory.parent, device, epochs)
    if data.name == "digits" and model == "dit":
        shipped = digits_teacher()
        denoiser, scheduler, tables, training = shipped.denoiser, shipped.scheduler, {}, read_json(ASSETS / "training.json")
    else:
        recipe = find_recipe(model, data, smoke)
        changed = {"minutes": minutes, "steps": steps}
        recipe = replace(recipe, **{name: value for name, value in changed.items() if value is not None})
        denoiser, conditioner = build(model, data, recipe)
        scheduler = make_scheduler()
        trained = train_denoiser(denoiser, conditioner, scheduler, data, recipe, directory / CHECKPOINT_NAME, device)
        tables, training = conditioner.tables(), {**asdict(recipe), **trained}
    record = {
        "data": data.name,
        "model": model,
        "classes": list(data.class_names),
        "templates": list(data.templates) if tables else [],
        "parameters": count_parameters(denoiser),
        "training": training,
        "classifier": classifier_record(data, directory.parent),
        "environment": environment(),
    }
    save_teacher(directory, denoiser, scheduler, tables, record)
    (directory / CHECKPOINT_NAME).unlink(missing_ok=True)
    print(f"{directory} is finished: {record['parameters']:,} parameters")
    return directory


def find_recipe(model: str, data: ImageData, smoke: bool) -> Recipe:
    size = data.shape[-1]
    if (model, size) not in RECIPES:
        known = ", ".join(f"{name} at {side}×{side}" for name, side in RECIPES)
        raise ValueError(f"expected one of {known}; found {model} at {size}×{size}")
    recipe = RECIPES[model, size]
    return replace(recipe, config={**recipe.config, **TINY[model, size]}, batch=16, steps=4, warmup=1) if smoke else recipe
