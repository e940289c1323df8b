"""Small models, and children that can be killed, for the tests of collecting, training and storing."""

import json
import multiprocessing
import os
import resource
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import nn

import agd_fast as agd
from agd_fast.distillation import TrainConfig
from agd_fast.trajectories import collect

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["agd_fast", "agd_fast.distillation"])


def dit(layers=1, width=16, classes=3, channels=1, seed=0, **config):
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=width // 2,
        num_layers=layers,
        in_channels=channels,
        out_channels=channels,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_num_groups=1,
        **config,
    )


def unet(embedding=8):
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=embedding,
    )


def ddim():
    return DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)


def tiny_teacher(**model):
    return agd.Teacher(dit(**model), ddim(), name="tiny")


class Net(nn.Module):
    """A denoiser that diffusers has never seen: x [B, 1, 4, 4], t [B], label [B] → [B, 1, 4, 4]."""

    def __init__(self):
        super().__init__()
        self.labels = nn.Embedding(4, 8)  # 3 is the null label
        self.conditioning = nn.Linear(8, 16)
        self.embed = nn.Linear(1, 16)
        self.block = nn.Linear(16, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, x, t, label):
        tokens = self.embed(x.flatten(1)[..., None])  # [B, 16, 16]
        hidden = tokens + self.conditioning(self.labels(label))[:, None] + t[:, None, None] / 1000
        mixed = self.block(hidden.tanh()).sigmoid() * hidden
        return self.out(hidden + mixed.sum(dim=1, keepdim=True)).view_as(x)


NET_SPEC = agd.DenoiserSpec(
    sample="x",
    timestep="t",
    conditions=(agd.Condition("label", embedding=("labels",), null=3),),
    attention=(agd.Site("block"),),
    modulation=(agd.Site("conditioning"), agd.Site("out")),
)


def custom_teacher():
    torch.manual_seed(0)
    return agd.Teacher(Net(), ddim(), NET_SPEC, sample_shape=(1, 4, 4), name="net")


def small(**changes):
    """An adapter that fits a tiny teacher."""
    return agd.AdapterConfig(**{"hidden": 4, **changes})


def short(**changes):
    """A few steps, logged and checkpointed often."""
    return TrainConfig(**{"steps": 12, "batch_size": 8, "checkpoint_every": 5, "log_every": 3, **changes})


def distill_tiny(directory, teacher=None, **changes):
    settings = {
        "class_labels": range(3),
        "output_dir": directory,
        "adapter": small(),
        "train_config": short(),
        "trajectories": 6,
        "sampling_steps": (3, 4),
        "shard_size": 2,
        "validation": 0,
        "progress": False,
    }
    return agd.distill(teacher or tiny_teacher(), **{**settings, **changes})


def collect_tiny(directory, teacher=None, labels=range(3), **changes):
    teacher = teacher or tiny_teacher()
    settings = {"trajectories": 5, "steps": 4, "shard_size": 2, "progress": False}
    return collect(teacher, teacher.conditions(labels), directory, **{**settings, **changes})


NAMES = ("sample", "timestep", "omega", "condition", "target")


def rows_of(trajectories):
    """All rows in order, as the shards hold them, with their labels as the condition."""
    rows = {name: torch.cat([shard[name] for shard in trajectories.shards]) for name in (*NAMES, "step")}
    labels = torch.cat([shard["condition/class_labels"][shard["condition"]] for shard in trajectories.shards])
    return {**rows, "condition": labels}


def in_child(function, *arguments):
    """What `function` returns or raises in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=_processes) as executor:
        return executor.submit(function, *arguments).result(timeout=120)


def in_children(function, count, *arguments):
    """The results of function(rank, *arguments) in `count` processes at once."""
    with ProcessPoolExecutor(count, mp_context=_processes) as executor:
        futures = [executor.submit(function, rank, *arguments) for rank in range(count)]
        return [future.result(timeout=120) for future in futures]


def kill_in_child(function, *arguments):
    """Run `function` in a process that must end by SIGKILL."""
    process = _processes.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"the child ended with {process.exitcode}"


def kill_self(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def after_calls(module, count, action, training=False):
    """Let `action()` happen in forward call number `count` of `module`, of those with gradients or of those without."""
    seen = 0

    def hook(*_):
        nonlocal seen
        seen += torch.is_grad_enabled() == training
        if seen == count:
            action()

    return module.register_forward_pre_hook(hook)


@contextmanager
def file_size_limit(size):
    """A disk that is full once a file reaches `size` bytes."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


def contents(directory):
    """The bytes of every file under a directory, by relative name."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def logged(directory):
    """The entries of a training run's log."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
