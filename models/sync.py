"""Batch norm over the images of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class AllReduce(torch.autograd.Function):
    """The sum over processes, with gradients from all of them."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return AllReduce.forward(ctx, gradient)


def sync_batch_norm(model: nn.Module) -> nn.Module:
    """Makes batch norms treat the images of all processes of the default group as one batch.

    Names stay the same. `torch.nn.SyncBatchNorm` does this on CUDA only, `BatchNorm` on the CPU."""
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            module.__class__ = BatchNorm
    return model


class BatchNorm(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over all processes, on the CPU. x (n, C, H, W) holds the images of
    this process, n ≥ 0. Gradients flow through the sums to all processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape, axes, dtype = (1, -1, 1, 1), (0, 2, 3), x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # under autocast, as in torch
        size = torch.tensor(float(x[:, 0].numel()), dtype=torch.float64, device=x.device)
        dist.all_reduce(size)
        mean = AllReduce.apply(x.sum(axes, dtype=torch.float64)) / size
        x = x - mean.view(shape).to(x.dtype)
        variance = AllReduce.apply(x.double().square().sum(axes)) / size
        with torch.no_grad():
            self.num_batches_tracked += 1
            plain_mean = 1 / float(self.num_batches_tracked)
            rate = plain_mean if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
            unbiased = variance * size / (size - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)
        scale = self.weight * (variance + self.eps).rsqrt().to(self.weight.dtype)
        return (x * scale.view(shape) + self.bias.view(shape)).to(dtype)
