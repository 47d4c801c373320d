"""Devices: where networks compute, in which precision, and with how many processes.

On a GPU, networks compute in bfloat16, or in float16 if the GPU is older. There are two ways:

    precision(device)         weights stay float32 and each call casts them, for networks that learn
    freeze(network, device)   weights are cast once, for networks that do not

Everything around the networks (noise, guidance, sampler steps, losses, optimizer) is float32.

`torchrun --nproc-per-node N train.py ...` starts the same script N times. Each process trains on
its own batches, PyTorch averages the gradients, and only the first process prints and writes.
Without torchrun, the functions of the last part have no effect.
"""

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from support.cli import number

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISION = "precision of networks; auto: bf16, on a GPU before Ampere fp16, on a CPU fp32"
LARGE = 3 * 10**8  # parameters of a U-Net; Stable Diffusion's has 860 million
PART = 8  # parameters whose moments are on the GPU at the same time with --offload


def choose_device(name):
    """The torch.device of a --device flag. Raises ValueError if it is not usable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter from a PyTorch built without CUDA
        raise ValueError(f"--device {name}: not usable ({str(error).splitlines()[0]})") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes repeat, so cuDNN may try all its kernels
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay float32
    return device


def add_drawing_flags(parser, seed, batch_size):
    """Add the flags of every command that draws clips; seed and batch_size are defaults."""
    parser.add_argument("--seed", type=number(int, 0, 2**62), default=seed,
                        help=f"seed of the first clip (default: {seed})")
    parser.add_argument("--batch-size", type=number(int, 1), default=batch_size,
                        help=f"clips at a time (default: {batch_size})")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--precision", default="auto", choices=("auto", *DTYPES), help=PRECISION)


def compute_dtype(device, choice="auto"):
    """The dtype in which networks compute on a device; choice is a --precision."""
    device = torch.device(device)
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if has_bf16(device) else "fp16"
    return DTYPES.get(choice, torch.float32)


def has_bf16(device):
    """Whether a device computes in bfloat16 faster than in float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported()
    with torch.cuda.device(device):  # GPUs before Ampere only emulate it
        return torch.cuda.is_bf16_supported(including_emulation=False)


def precision_notes(network, device, choice):
    """A line that names --precision bf16, if it would speed up a large network; otherwise none."""
    large = sum(parameter.numel() for parameter in network.parameters()) > LARGE
    if choice != "auto" or device.type != "cpu" or not large or not has_bf16(device):
        return ()
    return ("this CPU has bfloat16; --precision bf16 needs about half the time and half the "
            "memory, and changes the network's outputs by about 1 %",)


def precision(device, choice="auto"):
    """A context in which networks with float32 weights compute in `compute_dtype`."""
    dtype = compute_dtype(device, choice)
    autocast = dtype != torch.float32
    return torch.autocast(torch.device(device).type, dtype) if autocast else nullcontext()


def loss_scaler(device, choice="auto"):
    """The scaler of losses, for networks that compute in float16; without effect for others."""
    # float16 rounds gradients below 3e-8 to 0. The scaler multiplies the loss, and so all
    # gradients, by a large scale, and divides the gradients by it before the optimizer's step.
    half = compute_dtype(device, choice) == torch.float16
    return torch.amp.GradScaler(torch.device(device).type, enabled=half)


def freeze(network, device, choice="auto"):
    """Move a network to a device, in `compute_dtype`, without gradients; returns it."""
    dtype = compute_dtype(device, choice)
    if dtype == torch.float16 and getattr(network, "overflows_float16", False):
        dtype = torch.float32  # an autoencoder takes little of the time
    network.to(device, dtype)
    if torch.device(device).type != "cpu":  # a GPU convolves faster with channels innermost
        network.to(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False)


@contextmanager
def visit(networks, device):
    """A context in which networks are on the device; afterwards they are in CPU memory again."""
    for network in networks:
        network.to(device)
    try:
        yield
    finally:
        for network in networks:
            network.to("cpu")


def compile_for_sampling(network, device):
    """Compile a frozen network in place, for each shape separately; takes minutes per shape."""
    if torch.device(device).type == "cuda":  # CUDA graphs launch a whole step at once
        network.compile(mode="reduce-overhead", dynamic=False)
    else:  # freezing lays the weights out once for a CPU's kernels
        network.compile(options={"freezing": True}, dynamic=False)


# AdamW's moments in CPU memory (--offload)


def step_in_parts(optimizer):
    """optimizer.step() with moments in CPU memory, which visit the GPU a few parameters at a time.

    The results are the same. The copies are queued on the GPU, so the CPU does not wait for them.
    """
    groups = optimizer.param_groups
    for group in groups:
        for i in range(0, len(group["params"]), PART):
            part = group["params"][i : i + PART]  # a few parameters
            move_moments(optimizer, part, part[0].device)
            optimizer.param_groups = [group | {"params": part}]
            optimizer.step()
            move_moments(optimizer, part, "cpu")
    optimizer.param_groups = groups  # all parameters again


def move_moments(optimizer, parameters, device):
    """Move AdamW's moments of some parameters, if they exist yet. The CPU may read them only after
    it has waited for the device, as save_state() does when it looks for weights not finite."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = state[name].to(device, non_blocking=True)


# Several processes


def start(name):
    """Join the processes that torchrun started, if any. Returns this one's torch.device."""
    if "RANK" not in os.environ:
        return choose_device(name)
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("RANK is set without LOCAL_RANK; start with torchrun, or unset RANK")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # each process has its own GPU
        torch.cuda.set_device(name)
    device = choose_device(name)
    if not distributed.is_initialized():
        # The others wait while the first process encodes a cache or draws previews, which may take
        # longer than NCCL's usual limit of ten minutes.
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                       timeout=timedelta(hours=24))
    return device


def rank_and_count():
    """(index of this process, number of processes)."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_main():
    """Whether this process is the one that prints and writes."""
    return rank_and_count()[0] == 0


def barrier():
    """Wait until all processes are here."""
    if distributed.is_initialized():
        distributed.barrier()


def mean(value):
    """The mean over all processes of a tensor of one number, as a float."""
    value = value.clone()
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value.item() / rank_and_count()[1]


def wrap(network):
    """The network as a training step calls it, so that all processes average its gradients."""
    if not distributed.is_initialized():
        return network
    # A step on images skips the temporal layers (temporal.py), which then get no gradient.
    skipped = any("temporal" in name for name, _ in network.named_parameters())
    return DistributedDataParallel(network, find_unused_parameters=skipped,
                                   gradient_as_bucket_view=True)
