"""Wide ResNet (Zagoruyko and Komodakis, 2016): pre-activation blocks, `widen` times the channels.

The shortcut into a new stage is a 1x1 convolution of the activated input. There is no dropout.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import he_initialise_


class PreactivationBlock(nn.Module):
    """BatchNorm-ReLU-3x3, twice: (n, c_in, h, w) -> (n, c_out, h/stride, w/stride)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + shortcut


class WideResNet(nn.Module):
    """Wide ResNet `depth`-`widen`, `depth` = 6B + 4: (n, 3, h, w) -> (n, num_classes)."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"Invalid depth {depth}: it must be 6B + 4, such as 22 or 40.")
        blocks = (depth - 4) // 6
        channels = [16 * widen, 32 * widen, 64 * widen]
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, channels[0], blocks, stride=1)
        self.layer2 = _stage(channels[0], channels[1], blocks, stride=2)
        self.layer3 = _stage(channels[1], channels[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(channels[2])
        self.fc = nn.Linear(channels[2], num_classes)
        he_initialise_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreactivationBlock(in_channels, channels, stride)
    rest = (PreactivationBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
