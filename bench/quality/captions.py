"""What a teacher is told: a class by number, or a caption of it.

The caption encoder stands in for the text encoder of a text-to-image model: learnt with the denoiser, then frozen into a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PADDING = 0  # the token of a place without a word


class ClassLabels(nn.Module):
    """The class as a number, with one more number for no class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, labels: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """Classes [B] and which of them to drop [B] → the denoiser's arguments."""
        return {"class_labels": labels.masked_fill(dropped, self.num_classes)}

    def tables(self) -> dict[str, Tensor]:
        return {}


class CaptionEncoder(nn.Module):
    """One vector a word: a learnt token embedding plus a learnt position.

    templates: captions with one `{}` for the class, e.g. "a photo of a {}". class_names: one or several words each.
    The empty caption, which is the unconditional one, is padding alone.
    Raises: ValueError when a template has no `{}`.
    """

    captions: Tensor

    def __init__(self, templates: Sequence[str], class_names: Sequence[str], width: int) -> None:
        super().__init__()
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong or not templates:
            raise ValueError(f"expected templates with one {{}} for the class, found {wrong or 'none'}")
        words = [[template.format(name).split() for name in class_names] for template in templates]
        length = max(len(caption) for row in words for caption in row)
        vocabulary = sorted({word for row in words for caption in row for word in caption})
        token = {word: number for number, word in enumerate(vocabulary, start=PADDING + 1)}
        tokens = [[[token[w] for w in caption] + [PADDING] * (length - len(caption)) for caption in row] for row in words]
        self.register_buffer("captions", torch.tensor(tokens), persistent=False)  # [T, K, L]
        self.embedding = nn.Embedding(len(vocabulary) + 1, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.1)

    def forward(self, labels: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """Classes [B] and which of them get the empty caption [B] → [B, L, D], each in a random template."""
        templates = torch.randint(len(self.captions), labels.shape, device=labels.device)
        tokens = self.captions[templates, labels].masked_fill(dropped[:, None], PADDING)
        return {"encoder_hidden_states": self._embed(tokens)}

    @torch.no_grad()
    def tables(self) -> dict[str, Tensor]:
        """captions: all, template by template and class by class [T, K, L, D]; null: the empty one [1, L, D]."""
        empty = torch.full_like(self.captions[0, :1], PADDING)
        return {"captions": self._embed(self.captions), "null": self._embed(empty)}

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) + self.positions
