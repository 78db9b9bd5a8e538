"""The embedded teachers' U-Net: text by attention, and where there is one, the exact camera by rays.

Pixels are folded into channels, 2 x 2 for images of 64 pixels, so that network works at 32, 16, 8 and 4 pixels a side.
The caption enters twice: as keys of the attention at the two lowest levels, so that two colours can bind to two parts,
and as a whole through the scale and shift of every block, beside time and camera. The camera enters as an embedding
and as features of each pixel's ray, which tell every place in the image which line through the object it looks along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sds3d.cameras import Cameras

RAY_FEATURES = 18
CAMERA_FEATURES = 14


@dataclass(frozen=True)
class UNetConfig:
    """
    Args:
        widths: of each level, highest resolution first; each next one has half the side. At least two.
        blocks: of each level but the lowest, which has one each way.
        condition: width of what scales and shifts every block.
        text: width of the text encoder's vectors.
        heads: of the attention at the two lowest levels.
        size, channels: of the images; the side is a multiple of ``fold`` times 2 for each level but one.
        fold: side of the squares of pixels that become channels.
        cameras: whether it can be told a camera.
        dropout: share of the features dropped in training.
    """

    widths: tuple[int, ...] = (32, 64, 160, 192)
    blocks: tuple[int, ...] = (1, 2, 2)
    condition: int = 192
    text: int = 160
    heads: int = 4
    size: int = 64
    channels: int = 3
    fold: int = 2
    cameras: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        assert len(self.widths) == len(self.blocks) + 1 >= 2, (self.widths, self.blocks)
        assert self.size % (self.fold * 2 ** len(self.blocks)) == 0, self


def camera_features(cameras: Cameras) -> Tensor:
    """(B, CAMERA_FEATURES): sines and cosines of up to 4 times the azimuth and 2 times the elevation, distance, fov."""
    azimuth = torch.deg2rad(cameras.azimuth)[:, None] * torch.arange(1, 5, device=cameras.azimuth.device)
    elevation = torch.deg2rad(cameras.elevation)[:, None] * torch.arange(1, 3, device=cameras.azimuth.device)
    rest = torch.stack([cameras.distance - 3, (cameras.fov - 40) / 10], -1)
    return torch.cat([azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos(), rest], -1)


def ray_features(cameras: Cameras, side: int) -> Tensor:
    """(B, RAY_FEATURES, side, side): each ray's direction, and its point nearest to the origin with waves of it."""
    origins, directions = cameras.rays(side)
    nearest = origins - (origins * directions).sum(-1, keepdim=True) * directions
    waves = [f(math.pi * k * nearest) for k in (1, 2) for f in (torch.sin, torch.cos)]
    return torch.cat([directions, nearest, *waves], -1).permute(0, 3, 1, 2)


def time_features(t: Tensor, width: int = 64) -> Tensor:
    """(B,) in [0, 1] -> (B, width)."""
    angles = t[:, None] * 1000 * torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(1e4) / (width // 2)))
    return torch.cat([angles.sin(), angles.cos()], -1)


class Block(nn.Module):
    """Two 3 x 3 convolutions with a residual path; the condition scales and shifts between them."""

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.film = nn.Linear(condition, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Features (B, inputs, h, w) and conditions (B, condition) -> (B, outputs, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Every place looks at every place and at the caption's words, in one softmax."""

    def __init__(self, width: int, text: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.words = nn.Linear(text, 2 * width)
        self.out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """Features (B, width, h, w), words (B, L, text) and which of them count (B, L) bool -> (B, width, h, w)."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, -1)  # (B, HW, C)
        wk, wv = self.words(words).chunk(2, -1)  # (B, L, C)
        k, v = torch.cat([k, wk], 1), torch.cat([v, wv], 1)
        seen = torch.cat([mask.new_ones(b, h * w), mask], 1)[:, None, None, :]
        q, k, v = (y.view(b, -1, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return x + self.out(y.transpose(1, 2).reshape(b, h * w, c).transpose(1, 2).view(b, c, h, w))


class UNet(nn.Module):
    """Text-conditioned U-Net on (B, channels, size, size), told the camera where it can be."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        c, e = config.widths, config.condition
        pixels = config.channels * config.fold**2
        self.time = nn.Sequential(nn.Linear(64, e), nn.SiLU(), nn.Linear(e, e))
        self.caption = nn.Linear(config.text, e, bias=False)
        self.first = nn.Conv2d(pixels, c[0], 3, padding=1)
        if config.cameras:
            self.camera = nn.Sequential(nn.Linear(CAMERA_FEATURES, e), nn.SiLU(), nn.Linear(e, e, bias=False))
            self.rays = nn.ModuleList(nn.Conv2d(RAY_FEATURES, w, 1, bias=False) for w in c[:-1])
        down, up, shrink, grow = [], [], [], []
        for level, (width, count) in enumerate(zip(c, (*config.blocks, 1), strict=True)):
            down.append(nn.ModuleList(Block(width, width, e, config.dropout) for _ in range(count)))
            up.append(nn.ModuleList(Block(2 * width, width, e, config.dropout) for _ in range(count)))
            if level < len(c) - 1:
                shrink.append(nn.Conv2d(width, c[level + 1], 2, stride=2))
                grow.append(nn.Conv2d(c[level + 1], width, 1))
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self.shrink, self.grow = nn.ModuleList(shrink), nn.ModuleList(grow)
        self.look_down = nn.ModuleList(Attention(w, config.text, config.heads) for w in c[-2:])
        self.look_up = nn.ModuleList(Attention(w, config.text, config.heads) for w in c[-2:])
        self.norm = nn.GroupNorm(8, c[0])
        self.last = nn.Conv2d(c[0], pixels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: tuple[Tensor, Tensor, Tensor],
        cameras: Cameras | None = None,
        seen: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Predict v.

        Args:
            x: (B, C, H, W) noisy images; other sides than the config's work where they halve as often.
            t: (B,) in [0, 1].
            text: what `TextEncoder` returns.
            cameras: B cameras, or None for none.
            seen: (B,) 1 where the camera is given, 0 where it is dropped; not needed without cameras.
            extra: (B, condition), added to what scales and shifts every block.

        Returns:
            (B, C, H, W).
        """
        condition, rays = self._condition(x, t, text[2], cameras, seen, extra)
        kept: list[Tensor] = []
        h = self._descend(x, condition, text, rays, kept)
        for level in reversed(range(len(self.up))):
            blocks = self.up[level]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                h = block(torch.cat([h, kept.pop()], 1), condition)
            h = self._look(self.look_up, level, h, text)
            if level:
                h = F.interpolate(self.grow[level - 1](h), scale_factor=2, mode="nearest")
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.config.fold)

    def features(self, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        """What the way down sees of x (B, C, H, W) at t (B,): one map (B, width, h, w) a block, highest first."""
        condition, rays = self._condition(x, t, text[2], None, None, None)
        kept: list[Tensor] = []
        self._descend(x, condition, text, rays, kept)
        return kept

    def _condition(
        self,
        x: Tensor,
        t: Tensor,
        whole: Tensor,  # (B, text)
        cameras: Cameras | None,
        seen: Tensor | None,
        extra: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What scales and shifts every block, (B, condition); what the rays add to each level's pixels, if anything."""
        condition = self.time(time_features(t)) + self.caption(whole)
        if extra is not None:
            condition = condition + extra
        rays = []
        if cameras is not None:
            assert self.config.cameras and seen is not None, "this network takes no camera"
            condition = condition + self.camera(camera_features(cameras)) * seen[:, None]
            sides = [x.shape[-1] // self.config.fold // 2**level for level in range(len(self.rays))]
            rays = [f(ray_features(cameras, s) * seen[:, None, None, None]) for f, s in zip(self.rays, sides)]
        return F.silu(condition), rays

    def _descend(
        self,
        x: Tensor,
        condition: Tensor,
        text: tuple[Tensor, Tensor, Tensor],
        rays: list[Tensor],
        kept: list[Tensor],
    ) -> Tensor:
        """From pixels to the lowest level; every block's answer goes into ``kept``."""
        h = self.first(F.pixel_unshuffle(x, self.config.fold))
        for level, blocks in enumerate(self.down):
            if level:
                h = self.shrink[level - 1](h)
            if level < len(rays):
                h = h + rays[level]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                h = self._look(self.look_down, level, block(h, condition), text)
                kept.append(h)
        return h

    def _look(self, looks: nn.ModuleList, level: int, h: Tensor, text: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Attention, at the two lowest levels."""
        lowest = level - (len(self.down) - 2)
        return looks[lowest](h, *text[:2]) if lowest >= 0 else h
