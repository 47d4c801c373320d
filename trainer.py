"""One training loop for every stage: optimise, average, report, save, and continue after a kill.

A stage hands in an objective, a module whose forward(*batch) is the loss, and a function that makes
the batch of a step. Everything random in a batch comes from a generator seeded by (seed, stage,
step, process), so there is no random state to save: the data order after a kill is that without
one.

The training state is one file, replaced as a whole, so weights, average, optimizer and step always
belong together. `torchrun` starts the same script several times; PyTorch averages the gradients.
"""

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from files import atomic, write_text


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, answered at the end of a step, when everything is saved."""


def processes():
    """(rank, number) of this process among those that torchrun started; (0, 1) without it."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def step_generator(seed, stage, step, micro=0):
    """A CPU generator for all that is random in a batch of this process."""
    rank, world_size = processes()
    text = f"{seed} {stage} {step * world_size + rank} {micro}"
    # A fixed mixing of the text; Python's hash() differs from run to run.
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(number)


def learning_rate_at(step, num_steps, peak, warmup_steps):
    """Linear warm-up to the peak, then half a cosine down to (almost) nothing."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return peak * warmup * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))


class Average:
    """The exponential moving average of parameters: less noisy than any of the weights in it.

    Its decay warms up from 0.1, min(decay, (1 + step) / (10 + step)), or the average would long
    remember the random start. Karras et al. 2022, appendix F, discuss what it does for diffusion.
    """

    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        self.values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @contextmanager
    def swapped(self):
        """Inside, the parameters have the average's values, and it has theirs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):  # one by one, for a second copy of all might not fit
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)

    @torch.no_grad()
    def copy(self, values):
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class Metrics:
    """metrics.jsonl: a line per log interval; lines of steps that a resume repeats are dropped."""

    def __init__(self, path, stage, step):
        self.path, self.stage = Path(path), stage
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if not self._repeated(line, step)]
            write_text(self.path, "".join(line + "\n" for line in kept))

    def _repeated(self, line, step):
        try:
            entry = json.loads(line)
            return entry["stage"] == self.stage and entry["step"] > step
        except (ValueError, TypeError, KeyError):  # a line that a kill cut short
            return True

    def log(self, values):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, **values}) + "\n")


@contextmanager
def stop_signals():
    """Yield a list that gets an entry at Ctrl-C or SIGTERM; a second Ctrl-C stops at once."""
    received = []

    def receive(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {name: signal.signal(name, receive) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


@dataclass(frozen=True)
class Plan:
    """What one stage asks of the loop."""

    stage: str
    num_steps: int
    learning_rate: float
    objective: torch.nn.Module  # its forward(*batch) is the loss; it has parameter_groups()
    make_batch: Callable  # (step, micro) -> tuple of tensors on the device
    on_preview: Callable  # (step) -> None, called with the average's weights in place


class Trainer:
    """Runs a Plan to its end, from its beginning or from the state that a kill left behind."""

    def __init__(self, run_dir, plan, options, device):
        self.run_dir, self.plan, self.options, self.device = Path(run_dir), plan, options, device
        groups = plan.objective.parameter_groups()
        self.parameters = [parameter for parameters, _ in groups for parameter in parameters]
        self.average = Average(self.parameters, options.ema_decay)
        self.optimizer = torch.optim.AdamW(
            [{"params": parameters, "part": part} for parameters, part in groups],
            lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=options.weight_decay, fused=True,
        )
        self.step, self.main = 0, processes()[0] == 0
        self.loss_sum, self.loss_count = torch.zeros((), device=device), 0

    @property
    def state_path(self):
        return self.run_dir / "training_state.pt"

    def save_state(self):
        """Everything that the next step needs, in one file, if loss and weights are finite."""
        self.check_loss()
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            self._refuse("model")
        state = {
            "stage": self.plan.stage, "step": self.step,
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average.values, "optimizer": self.optimizer.state_dict(),
        }
        if self.main:
            with atomic(self.state_path) as file:
                torch.save(state, file)

    def load_state(self, state):
        """Continue from what save_state wrote."""
        shapes = [tuple(p.shape) for p in self.parameters]
        if [tuple(p.shape) for p in state["parameters"]] != shapes:
            raise ValueError(f"{self.state_path}: belongs to a model of another configuration")
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.copy(state["parameters"])
        for value, saved in zip(self.average.values, state["average"], strict=True):
            value.copy_(saved)

    def check_loss(self):
        """The mean loss since the last look at it. Reading it waits for the device."""
        total = self.loss_sum.clone()
        if distributed.is_initialized():
            distributed.all_reduce(total)
        mean = total.item() / max(1, self.loss_count * processes()[1])
        if not math.isfinite(mean):
            self._refuse("loss")
        return mean

    def _refuse(self, what):
        raise ValueError(
            f"the {what} of the {self.plan.stage} stage is not finite at step {self.step} (it was "
            f"at most {self.loss_count} steps ago); nothing of it is saved: remove "
            f"{self.state_path} if it exists, and start the stage anew with a lower "
            f"--{self.plan.stage}-learning-rate"
        )

    def run(self):
        """Train to the plan's last step; then the parameters are the average's, and it returns."""
        plan, options = self.plan, self.options
        forward = self._wrapped()
        metrics = Metrics(self.run_dir / "metrics.jsonl", plan.stage, self.step)
        bar = tqdm(
            total=plan.num_steps, initial=self.step, desc=f"{plan.stage:5}", unit="step",
            disable=not self.main or "TQDM_DISABLE" in os.environ, dynamic_ncols=True,
            smoothing=0.1,
        )
        with stop_signals() as received, bar:
            started, first = time.perf_counter(), self.step
            while self.step < plan.num_steps:
                rate = self._optimise(forward)
                bar.update()
                last = self.step == plan.num_steps
                if self.step % options.log_every == 0 or last:
                    loss, now = self.check_loss(), time.perf_counter()
                    self.loss_sum.zero_()
                    self.loss_count = 0
                    bar.set_postfix(loss=f"{loss:.4f}", rate=f"{rate:.1e}")
                    if self.main:
                        metrics.log({
                            "step": self.step, "loss": loss, "learning_rate": rate,
                            "steps_per_second": (self.step - first) / (now - started),
                        })
                    started, first = now, self.step
                stopping = self._stopping(received)
                if self.step % options.save_every == 0 or last or stopping:
                    self.save_state()
                if stopping:
                    raise Stopped(f"stopped at step {self.step} of the {plan.stage} stage; "
                                  "continue with --resume")
                if self.main and not last and self.step % options.preview_every == 0:
                    with self.average.swapped():
                        plan.on_preview(self.step)
        self.average.copy(self.average.values)

    def _stopping(self, received):
        """Whether any process got a signal: all stop after the same step, or one waits for ever."""
        if not distributed.is_initialized():
            return bool(received)
        if self.step % self.options.log_every:  # asking the others waits for them
            return False
        count = torch.tensor(float(len(received)), device=self.device)
        distributed.all_reduce(count)
        return count.item() > 0

    def _wrapped(self):
        """The objective as a step calls it: compiled if asked for, one with other processes."""
        forward = self.plan.objective
        if self.options.compile:
            forward = torch.compile(forward)
        if distributed.is_initialized():
            # Pictures go by temporal layers (temporal.py), which then get no gradient in that step.
            skipped = any("temporal" in name for name, _ in self.plan.objective.named_parameters())
            forward = DistributedDataParallel(forward, find_unused_parameters=skipped)
        return forward

    def _optimise(self, forward):
        """One optimizer step, over all its micro-batches. Returns the learning rate it used."""
        plan, options = self.plan, self.options
        rate = learning_rate_at(self.step, plan.num_steps, plan.learning_rate, options.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["part"]
        for micro in range(options.accumulate):
            early = micro < options.accumulate - 1
            wait = forward.no_sync() if early and hasattr(forward, "no_sync") else nullcontext()
            batch = plan.make_batch(self.step, micro)
            with (
                wait,
                torch.autocast("cuda", torch.bfloat16, enabled=options.uses_bf16(self.device)),
            ):
                loss = forward(*batch) / options.accumulate
            loss.backward()
            # The sum stays on the device: reading it here would make every step wait.
            self.loss_sum += loss.detach()
        self.loss_count += 1
        torch.nn.utils.clip_grad_norm_(self.parameters, options.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.step)
        self.step += 1
        return rate


def start_processes(device):
    """Join the processes that torchrun started, if it did; returns this one's device."""
    if "RANK" not in os.environ:
        return device
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device
