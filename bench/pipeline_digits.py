"""A StableDiffusionPipeline around the captioned digits UNet: distilled from its own runs, then called as a user calls it.

python bench/pipeline_digits.py --seeds 3 --json bench/results/pipeline_digits.json --picture docs/pipeline_digits.png
python bench/pipeline_digits.py --seeds 1 --evaluate runs/pipeline_digits  # by agd.evaluate_pipeline, captions held out
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.utils.pil_utils import pt_to_pil
from rich.console import Console
from torch import Tensor

import agd_fast as agd
from agd_fast.environment import environment
from agd_fast.evaluation import frechet_distance
from agd_fast.evaluation.evaluate import count_evaluations
from agd_fast.files import write_json
from agd_fast.reporting.pictures import save_grid
from agd_fast.reporting.pipeline_tables import print_pipeline_evaluation
from agd_fast.reporting.tables import NAMES, rich_table
from nfe_speed import commit
from quality.teachers import TEACHERS, BenchTeacher, load_teacher

SIZE, BATCH, STEPS = {"height": 8, "width": 8}, 200, 25
HEADER = ("arm", "NFE", "Fréchet", "class accuracy", "RMSE to CFG / unguided's")


class Pixels(AutoencoderKL):
    """A VAE whose latents are the pictures."""

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> tuple[Tensor]:
        return (z,)


def make_pipeline(bench: BenchTeacher) -> StableDiffusionPipeline:
    """The pipeline around the teacher's UNet, in the UNet's own sample space; captions are passed as embeddings."""
    sizes = {"in_channels": 1, "out_channels": 1, "latent_channels": 1, "block_out_channels": (4,), "norm_num_groups": 1}
    vae = Pixels(**sizes, scaling_factor=1.0)
    parts = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(
        vae=vae, unet=bench.teacher.denoiser, scheduler=bench.teacher.scheduler, **parts, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def captions_of(bench: BenchTeacher, *, held_out: bool = False) -> dict[str, Tensor]:
    """held_out: captions of the template that no adapter is distilled on, one per digit."""
    table = bench.held_out[0] if held_out and bench.held_out else bench.table
    captions = table["encoder_hidden_states"]
    null = bench.teacher.null_condition["encoder_hidden_states"]
    return {"prompt_embeds": captions, "negative_prompt_embeds": null.expand_as(captions)}


def generate(pipe: Any, inputs: dict[str, Tensor], rows: Tensor, scale: float, seed: int) -> Tensor:
    """Samples [N, 1, 8, 8] by the pipeline's own call."""
    arguments = {name: value[rows] for name, value in inputs.items() if scale > 1 or not name.startswith("negative")}
    generators = [torch.Generator().manual_seed(seed + int(index)) for index in range(len(rows))]
    return pipe(
        **arguments, **SIZE, guidance_scale=scale, num_inference_steps=STEPS, generator=generators, output_type="latent"
    ).images


def arms_of(pipe: Any, bench: BenchTeacher, scale: float) -> dict[str, Any]:
    """How each arm calls the pipeline for rows of the captions."""
    inputs = captions_of(bench)
    positive = {"prompt_embeds": inputs["prompt_embeds"]}

    def two_passes(rows: Tensor, seed: int) -> Tensor:
        with agd.disabled(pipe):
            return generate(pipe, inputs, rows, scale, seed)

    return {
        "unguided": lambda rows, seed: generate(pipe, positive, rows, 1.0, seed),
        "cfg": two_passes,
        "agd": lambda rows, seed: generate(pipe, positive, rows, scale, seed),
    }


def measure(pipe: Any, bench: BenchTeacher, scale: float, samples: int, seed: int) -> dict[str, dict[str, float]]:
    reference = bench.reference
    assert reference is not None and reference.classify is not None
    real = reference.features(reference.images)
    found: dict[str, dict[str, float]] = {}
    images: dict[str, Tensor] = {}
    arms = arms_of(pipe, bench, scale)
    rows = torch.arange(samples) % len(bench.row_labels)
    first = range(seed * samples, (seed + 1) * samples, BATCH)  # for each batch, the seed of its first picture's noise
    for name, arm in arms.items():
        with count_evaluations(pipe.unet) as count:
            images[name] = torch.cat([arm(part, start) for part, start in zip(rows.split(BATCH), first, strict=True)])
        hits = reference.classify(images[name]).argmax(dim=1) == bench.row_labels[rows]
        found[name] = {
            "nfe": count[0] / samples,
            "frechet_distance": frechet_distance(real, reference.features(images[name])),
            "class_accuracy": float(hits.float().mean()),
        }
    rmse = {name: float((values - images["cfg"]).square().mean().sqrt()) for name, values in images.items()}
    for name in found:
        found[name]["rmse_to_cfg"] = rmse[name] / rmse["unguided"]
    return found


def draw(pipe: Any, bench: BenchTeacher, path: Path) -> None:
    """Unguided, CFG and AGD from the same noise; one column per digit."""
    rows = torch.arange(10)
    arms = arms_of(pipe, bench, 4.0)
    save_grid(path, {NAMES[name]: arm(rows, 7) for name, arm in arms.items()}, [str(row) for row in rows.tolist()])


def evaluate(pipe: Any, bench: BenchTeacher, folder: Path, samples: int, seed: int) -> None:
    """With `agd.evaluate_pipeline`, against the real digits as PNG files and in the features of the digits' classifier."""
    reference = bench.reference
    assert reference is not None
    real = folder / "real"
    real.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pt_to_pil(reference.images)):
        picture.save(real / f"{index:05d}.png")

    def digits_classifier(pictures: Tensor) -> Tensor:
        return reference.features(pictures.mean(dim=1, keepdim=True) * 2 - 1)

    found = agd.evaluate_pipeline(
        pipe,
        inputs=captions_of(bench, held_out=True),
        call=SIZE,
        guidance_scales=(2.0, 4.0),
        steps=STEPS,
        samples=samples,
        metrics={"fid": digits_classifier},
        real=real,
        batch_size=50,
        seed=seed,
        output_dir=folder,
    )
    print_pipeline_evaluation(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--trajectories", type=int, default=400)
    parser.add_argument("--train-steps", type=int, default=agd.TrainConfig.steps)
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="where CFG's own Fréchet distance is lowest")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    parser.add_argument("--picture", type=Path, help="also draw samples of the first seed to this PNG")
    parser.add_argument("--evaluate", type=Path, help="also evaluate the first seed's adapter, with a report in this folder")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        bench = load_teacher(TEACHERS / "digits-unet")
        pipe = make_pipeline(bench)
        with tempfile.TemporaryDirectory() as folder:
            result = agd.distill(
                pipe,
                inputs=captions_of(bench),
                call=SIZE,
                output_dir=folder,
                trajectories=args.trajectories,
                train_config=agd.TrainConfig(steps=args.train_steps),
                validation=50,
                seed=seed,
            )
        assert result.explained is not None
        arms = measure(pipe, bench, args.guidance_scale, args.samples, seed)
        runs.append({"seed": seed, "explained": result.explained.to_dict(), "fraction": result.fraction, "arms": arms})
        if args.picture and seed == 0:
            draw(pipe, bench, args.picture)
        if args.evaluate and seed == 0:
            evaluate(pipe, bench, args.evaluate, args.samples, seed)
    explained = [run["explained"]["mean"] for run in runs]
    spread = statistics.stdev(explained) if len(runs) > 1 else float("nan")
    keys = ("nfe", "frechet_distance", "class_accuracy", "rmse_to_cfg")
    cells = [
        (name, *(f"{statistics.mean(run['arms'][name][key] for run in runs):.3f}" for key in keys))
        for name in ("unguided", "cfg", "agd")
    ]
    title = f"{args.seeds} seeds: explained {statistics.mean(explained):.3f} ± {spread:.3f}"
    Console().print(rich_table(title, HEADER, cells))
    if args.json:
        settings = {name: getattr(args, name) for name in ("samples", "trajectories", "train_steps", "guidance_scale")}
        write_json(args.json, {"environment": environment(), "commit": commit(), "settings": settings, "runs": runs})


if __name__ == "__main__":
    main()
