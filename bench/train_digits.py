"""Train the classifier and the DiT teacher that ship with the package, from a seed.

python bench/train_digits.py            # writes agd_fast/datasets/assets/, ~1 minute on 2 cores

The digits are too easy for guidance to matter: a teacher that has learnt their labels well needs none. So a fifth of the
labels is replaced by random ones, as wrong captions are in web-scale data; guidance then repairs the class visibly.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from agd_fast.datasets.digits import ASSETS, CLASSIFIER_FILE, TEACHER_DIR, DigitsClassifier, digits_images
from agd_fast.files import write_json, write_tensors


def train_classifier(
    images: Tensor, labels: Tensor, seed: int, epochs: int = 40, batch: int = 64
) -> tuple[DigitsClassifier, float]:
    """A classifier trained on a stratified 80 %, in the float16 that is shipped, and its accuracy on the other 20 %."""
    rows = torch.arange(len(labels)).numpy()
    train, test = train_test_split(rows, test_size=0.2, stratify=labels.numpy(), random_state=seed)
    torch.manual_seed(seed)
    model = DigitsClassifier()
    steps = epochs * (len(train) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(epochs), desc="classifier"):
        order = torch.from_numpy(train)[torch.randperm(len(train))]
        for part in order.split(batch)[: len(train) // batch]:
            x = images[part] + 0.1 * torch.randn(len(part), 1, 8, 8)
            if torch.rand(()) < 0.5:  # shift by a pixel
                dx, dy = torch.randint(0, 3, (2,)).tolist()
                x = F.pad(x, (1, 1, 1, 1), value=-1.0)[:, :, dy : dy + 8, dx : dx + 8]
            loss = F.cross_entropy(model(x), labels[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().half().float()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    return model, accuracy


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def train_teacher(
    images: Tensor,
    labels: Tensor,
    seed: int,
    steps: int = 1000,
    batch: int = 128,
    dropout: float = 0.1,
    label_noise: float = 0.2,
) -> DiTTransformer2DModel:
    """The EMA of a DiT trained with v-prediction. Eval mode throughout: in train mode each block would drop labels on its own."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        in_channels=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    scheduler = make_scheduler()
    average = EMAModel(model.parameters(), decay=0.998)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    for _ in tqdm(range(steps), desc="teacher"):
        rows = torch.randint(0, len(images), (batch,))
        x0, noise = images[rows], torch.randn(batch, 1, 8, 8)
        y = torch.where(torch.rand(batch) < label_noise, torch.randint(0, 10, (batch,)), labels[rows])
        y = torch.where(torch.rand(batch) < dropout, torch.full_like(y, 10), y)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (batch,))
        x = scheduler.add_noise(x0, noise, t)
        prediction = model(x, timestep=t, class_labels=y).sample
        loss = F.mse_loss(prediction, scheduler.get_velocity(x0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        average.step(model.parameters())
    average.copy_to(model.parameters())
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the teacher")
    parser.add_argument("--epochs", type=int, default=40, help="of the classifier")
    args = parser.parse_args()
    torch.set_num_threads(2)  # the order of sums depends on it
    images, labels = digits_images()
    classifier, accuracy = train_classifier(images, labels, args.seed, args.epochs)
    write_tensors(args.output / CLASSIFIER_FILE.name, {name: value.half() for name, value in classifier.state_dict().items()})
    print(f"classifier: {accuracy:.4f} of the held-out digits right")
    teacher = train_teacher(images, labels, args.seed, args.steps)
    teacher.half().save_pretrained(args.output / TEACHER_DIR.name)
    make_scheduler().save_pretrained(args.output / TEACHER_DIR.name)
    settings = {"seed": args.seed, "steps": args.steps, "epochs": args.epochs}
    write_json(args.output / "training.json", {**settings, "classifier_accuracy": accuracy})


if __name__ == "__main__":
    main()
