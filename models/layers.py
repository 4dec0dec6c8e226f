"""The initialisation of all models."""

from torch import nn


def he_initialise_(model: nn.Module) -> None:
    """He initialisation (He et al., 2015): weights from N(0, 2 / fan_in), biases zero.

    It takes fan_in, not fan_out, because fan_in is right for depthwise convolutions too.
    Normalisation layers keep torch's default, scale 1 and shift 0.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
