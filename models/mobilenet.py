"""MobileNet v1 (Howard et al., 2017), width 1: depthwise separable convolutions.

It has 4,231,976 parameters for 1,000 classes. It is made for images of 224x224 and divides their
side by 32. Images of 32x32 end as a single pixel, so training on them needs batches of two or more.
"""

import torch
from torch import nn

from models.layers import he_initialise_

# Output channels and stride of each depthwise separable layer (table 1 of the paper).
LAYERS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
LAYERS += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]


class MobileNet(nn.Module):
    """MobileNet v1: (n, 3, h, w) -> (n, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers = [_convolution(3, 32, 3, stride=2)]
        channels = 32
        for out_channels, stride in LAYERS:
            depthwise = _convolution(channels, channels, 3, stride, groups=channels)
            pointwise = _convolution(channels, out_channels, 1)
            layers.append(nn.Sequential(depthwise, pointwise))
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)
        he_initialise_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


def _convolution(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )
