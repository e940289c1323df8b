"""Denoisers whose modules have several entries a sample in their batch, such as the frames of a video, or their pixels."""

import pytest
import torch
from torch import Tensor, nn

import agd_fast as agd
from agd_fast.attaching import require_attachment
from conftest import trained

SPEC = agd.DenoiserSpec(
    conditions=(agd.Condition("prompt", width=6, grouped=True),),
    attention=(agd.Site("space", input_width=5), agd.Site("time")),
    convolution=(agd.Site("conv", channel_dim=1),),
    modulation=(
        agd.Site("conv", form="scale", channel_dim=1),
        agd.Site("space", form="affine"),
        agd.Site("time"),
        agd.Site("gate", argument="vector", width=3),
    ),
)
KINDS = ("modulation", "gated_lora", "cross_attention", "offset")


class Gate(nn.Module):
    def forward(self, hidden: Tensor, vector: Tensor) -> Tensor:
        return hidden * vector.mean(1)[:, None, None]


class Frames(nn.Module):
    """Each frame by itself, whatever the batch of its modules is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.space, self.time, self.gate = nn.Conv2d(4, 5, 3, padding=1), nn.Linear(5, 4), nn.Linear(4, 4), Gate()

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        count, _, frames, height, width = sample.shape
        x = self.conv(sample.transpose(1, 2).flatten(0, 1))  # [B·F, 5, H, W]
        x = self.space(x.flatten(2).transpose(1, 2))  # [B·F, H·W, 4]
        x = self.gate(x, prompt.mean(1)[:, :3])
        x = self.time(x.unflatten(0, (count, frames)).transpose(1, 2).flatten(0, 1))  # [B·H·W, F, 4]
        return x.unflatten(0, (count, height, width)).permute(0, 4, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_acts_on_all_entries_of_a_sample_and_on_no_others(kind):
    model = Frames().eval()
    agd.attach(model, agd.AdapterConfig(kind, 4), spec=SPEC)
    trained(require_attachment(model).adapter)
    x, t, prompts = torch.randn(2, 4, 3, 2, 5), torch.tensor([10.0, 700.0]), torch.randn(2, 7, 6)

    def guided(scales: list[float], rows: slice, frames: slice) -> Tensor:
        sample = x[rows, :, frames]
        with agd.guided(model, scales):
            return model(sample, t[rows], prompts[rows].repeat_interleave(sample.shape[2], dim=0))

    together = guided([1.5, 4.0], slice(2), slice(3))
    alone = [
        torch.cat([guided([scale], slice(row, row + 1), slice(frame, frame + 1)) for frame in range(3)], dim=2)
        for row, scale in enumerate([1.5, 4.0])
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    plain = model(x, t, prompts.repeat_interleave(3, dim=0))
    assert all((one - own).abs().max() > 1e-2 for one, own in zip(together, plain, strict=True))
