"""A closed-vocabulary text encoder: one vector for each word, and one for the whole caption."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sds3d.prompts import words

MAX_WORDS = 24
PROMPT_WORDS = MAX_WORDS - 6  # longest prompt of a user: a run may add "side view" and "on a grey background"


class TextEncoder(nn.Module):
    """A small transformer over words.

    Args:
        vocabulary: the known words. Token 0 is padding and token 1 starts every caption, so word i is token i + 2.
        width: size of the vectors.
        layers: number of transformer layers.
        heads: attention heads of each layer.
    """

    def __init__(self, vocabulary: tuple[str, ...], width: int = 160, layers: int = 2, heads: int = 4):
        super().__init__()
        self.index = {w: i + 2 for i, w in enumerate(vocabulary)}
        self.words = nn.Embedding(len(vocabulary) + 2, width)
        self.places = nn.Parameter(torch.randn(MAX_WORDS + 1, width) * 0.02)
        nn.init.normal_(self.words.weight, std=0.5)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def tokens(self, captions: list[str]) -> Tensor:
        """Return token indices (B, L), padded with 0, L <= MAX_WORDS + 1. A null caption is the start token alone.

        Raises:
            ValueError: a caption has more than MAX_WORDS words.
        """
        rows = []
        for caption in captions:
            row = [1] + [self.index[w] for w in words(caption)]
            if len(row) > MAX_WORDS + 1:
                raise ValueError(f"a prompt of {len(row) - 1} words; at most {MAX_WORDS} are read: shorten it")
            rows.append(row)
        length = max(map(len, rows))
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode tokens (B, L).

        Returns:
            Word vectors (B, L, width), mask (B, L), True where there is a token, and caption vectors (B, width).
        """
        mask = tokens != 0
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        x = self.norm(self.blocks(x, src_key_padding_mask=~mask))
        return x, mask, x[:, 0]
