"""All there is of several processes: `torchrun --nproc-per-node N train.py ...` starts the same
script N times, and each process trains on its own batches.

PyTorch averages the gradients (DistributedDataParallel), so after every step all processes hold the
same weights; the first one alone prints and writes, but for caches, of which each writes a share.
Without torchrun each function here does what one process needs: nothing.
"""

import os
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from cli import choose_device


def start(name):
    """Join the processes that torchrun started, if it did; returns the device of this one.

    name is that of a --device flag. Of several processes each has the GPU of its own number, and
    touches no other one: a look at it would take memory there.
    """
    if "RANK" not in os.environ:
        return choose_device(name)
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    device = choose_device(name)
    if not distributed.is_initialized():
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        # They wait for the first one's previews and for the last one's share of a cache. NCCL's
        # own patience is ten minutes.
        distributed.init_process_group(backend, device_id=own, timeout=timedelta(hours=2))
    return device


def rank_and_count():
    """(number of this process from 0 on, how many there are)."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_main():
    """Whether this process is the one that prints and writes."""
    return rank_and_count()[0] == 0


def mean(value):
    """The mean over all processes of a tensor of one number, as a float. Waits for all of them."""
    value = value.clone()
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value.item() / rank_and_count()[1]


def barrier():
    """Wait until all processes are here."""
    if distributed.is_initialized():
        distributed.barrier()


def wrap(network):
    """The network as a training step calls it, so that its gradients become the processes' mean."""
    if not distributed.is_initialized():
        return network
    # A step on images skips the temporal layers (temporal.py), which then get no gradient.
    skipped = any("temporal" in name for name, _ in network.named_parameters())
    # The gradients are the buckets that are exchanged: no second copy of them.
    return DistributedDataParallel(network, find_unused_parameters=skipped,
                                   gradient_as_bucket_view=True)


def average_gradients(networks, now):
    """Whether the next backward passes exchange gradients: those of a step's last batch do."""
    for network in networks:
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = now
