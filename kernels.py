"""(stub until the kernels land)"""

import torch


def cuda_kernels(device: torch.device):
    return None
