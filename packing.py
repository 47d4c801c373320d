"""Convolution weights laid out once for a CPU, instead of at every call.

oneDNN, which computes PyTorch's convolutions on CPUs, wants weights in blocks that suit its vector
registers. An nn.Conv2d brings its weights into that order at every call. A batch of few and small
frames has little else to do: the 1280 x 1280 x 3 x 3 weights of Stable Diffusion's lowest levels
are 59 MB, its activations there 0.3 MB. So a network that only samples keeps the blocks.

The two operations are those with which torch.compile freezes a network for inference.
"""

import torch
from torch import nn

MAX_CHANNELS = 640  # into one convolution: the partial sums of wider ones fall out of the cache


class PackedConv2d(nn.Module):
    """An nn.Conv2d for inference, from x (n, c, h, w) to channels_last; its state_dict is equal."""

    def __init__(self, conv):
        super().__init__()
        self.bias = conv.bias
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        self.packed = [
            torch.ops.mkldnn._reorder_convolution_weight(part.contiguous(), *self.geometry, [])
            for part in conv.weight.detach().split(MAX_CHANNELS, dim=1)
        ]

    def forward(self, x):
        """The convolution of each part of the channels, and their sum."""
        total, bias = None, self.bias
        for part, weight in zip(x.split(MAX_CHANNELS, dim=1), self.packed, strict=True):
            part = part.contiguous(memory_format=torch.channels_last)
            y = torch.ops.mkldnn._convolution_pointwise(
                part, weight, bias, *self.geometry, "none", [], ""
            )
            total, bias = y if total is None else total.add_(y), None
        return total

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = torch.cat([part.to_dense() for part in self.packed], dim=1)
        super()._save_to_state_dict(destination, prefix, keep_vars)


def pack(network):
    """Replace the wide convolutions of a network on the CPU; returns the network.

    There is no way back: it can be saved, but no more trained or moved to a GPU.
    """
    if not torch.backends.mkldnn.is_available():  # a PyTorch built without oneDNN
        return network
    for module in list(network.modules()):
        for name, child in module.named_children():
            # A 1x1 convolution is a matrix product already, and packed it takes a slow path.
            if type(child) is nn.Conv2d and child.kernel_size != (1, 1):
                setattr(module, name, PackedConv2d(child))
    return network
