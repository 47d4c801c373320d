"""One training loop for every stage: optimise, average, report, save, and continue after a kill.

A stage writes its step itself and hands the loss over:

    for step, generator in trainer.steps():
        ...
        trainer.backward(loss)

Everything random in a batch comes from that generator, which is seeded by (seed, stage, step,
process). So there is no random state to save, and a resumed run sees the batches that it would have
seen without the stop. The training state is one file, replaced as a whole: weights, average,
optimizer and step always belong together.
"""

import hashlib
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

import processes
from files import atomic, full_disk, open_regular, require_room, write_text

WEIGHT_DECAY = 0.01  # of AdamW
GRADIENT_CLIP = 1.0  # largest norm of the gradient
AVERAGE_EVERY = 10  # steps of a GPU that count at once: an average in CPU memory has a long way
PART = 8  # parameters whose moments are on the GPU at a time, if they live in CPU memory


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, answered at the end of a step, when everything is saved."""


def step_generator(seed, stage, step, micro=0):
    """A CPU generator for all that is random in a batch of this process."""
    rank, count = processes.rank_and_count()
    text = f"{seed} {stage} {step * count + rank} {micro}"
    # A fixed mixing of the text; Python's hash() differs from run to run.
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(number)


def learning_rate_at(step, num_steps, peak, warmup_steps):
    """Linear warm-up to the peak, then half a cosine down to (almost) nothing."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return peak * warmup * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))


class Average:
    """The exponential moving average of parameters: less noisy than any of the weights in it.

    Its decay warms up from 0.1, min(decay, (1 + step) / (10 + step)), because a constant one keeps
    the random initialisation for long. Karras et al. 2022, appendix F, discuss it for diffusion.
    """

    def __init__(self, parameters, decay, every=1, on_cpu=False):
        self.parameters, self.decay = [p.detach() for p in parameters], decay
        self.every, self.on_cpu = every, on_cpu
        places = ["cpu" if on_cpu else parameter.device for parameter in self.parameters]
        # A copy that does not block is pinned, so later copies do not block either.
        self.values = [parameter.to(place, copy=True, non_blocking=True)
                       for parameter, place in zip(self.parameters, places, strict=True)]

    def update(self, step):
        """Let every so many steps count at once, with the decay to that power."""
        if (step + 1) % self.every:
            return
        rest = 1 - min(self.decay, (1 + step) / (10 + step)) ** self.every
        if not self.on_cpu:
            torch._foreach_lerp_(self.values, self.parameters, rest)
            return
        for value, parameter in zip(self.values, self.parameters, strict=True):
            average = value.to(parameter.device, non_blocking=True)  # visits the GPU, one by one
            value.copy_(average.lerp(parameter, rest), non_blocking=True)

    @contextmanager
    def swapped(self):
        """Inside, the parameters have the average's values, and it has theirs."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):  # one by one, since a second copy of all might not fit
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.clone()
            parameter.copy_(value)
            value.copy_(kept)


def move_moments(optimizer, parameters, device):
    """Move AdamW's moments of some parameters, if there are any yet."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = state[name].to(device, non_blocking=True)


def step_in_parts(optimizer):
    """optimizer.step() with moments that are in CPU memory: they visit their parameters in parts.

    The numbers are the same. Both copies of a part wait for nothing but the GPU's own queue.
    """
    groups = optimizer.param_groups
    for group in groups:
        for i in range(0, len(group["params"]), PART):
            part = group["params"][i : i + PART]
            move_moments(optimizer, part, part[0].device)
            optimizer.param_groups = [group | {"params": part}]
            optimizer.step()
            move_moments(optimizer, part, "cpu")
    optimizer.param_groups = groups


def drop_repeated(path, stage, step):
    """Remove from metrics.jsonl the lines of a stage's later steps, which a resume repeats."""
    def keep(line):
        try:
            entry = json.loads(line)
            return entry["stage"] != stage or entry["step"] <= step
        except (LookupError, RecursionError, TypeError, ValueError):  # a kill cut it short
            return False

    if path.exists():
        with open_regular(path) as file:
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        write_text(path, "".join(line + "\n" for line in lines if keep(line)))


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


class Trainer:
    """Takes a stage of a run to its end, from its beginning or from the state that a kill left.

    `groups` are [(parameters, their part of the learning rate), ...].
    """

    def __init__(self, run, stage, groups):
        options = self.options = run.options
        self.run_dir, self.device, self.stage, self.step = run.path, run.device, stage, 0
        self.state_path = run.path / "training_state.pt"
        self.num_steps = getattr(options, f"{stage}_steps")
        self.learning_rate = getattr(options, f"{stage}_learning_rate")
        groups = [{"params": list(parameters), "part": part} for parameters, part in groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.state_bytes = 4 * sum(p.nbytes for p in self.parameters)  # with average and moments
        # A state is written beside the last one, or a model beside it.
        require_room(run.path, self.state_bytes * (2 if run.state is None else 1.25))
        self.plan = run.plan(stage)
        whole = self.num_steps % AVERAGE_EVERY == 0  # or else the last steps would not count
        every = AVERAGE_EVERY if self.device.type == "cuda" and whole else 1
        self.average = Average(self.parameters, options.ema_decay, every, self.plan.average_on_cpu)
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.99),
                                           weight_decay=WEIGHT_DECAY, fused=True)
        self.wrapped = []
        self.loss_sum, self.loss_count = torch.zeros((), device=self.device), 0
        if run.state is not None:
            self.load_state(run.state)
            run.state = None  # the stages after this one start from their beginning

    def wrap(self, network):
        """A network as a step calls it: compiled if asked for, one with other processes' copies."""
        wrapped = processes.wrap(network)
        if self.options.compile:  # in place; around DDP, so that it exchanges during the backward
            wrapped.compile(dynamic=False)
        self.wrapped.append(wrapped)
        return wrapped

    def steps(self, preview=None):
        """Yield (step, generator) for each batch; answer each with backward(loss).

        preview(step) draws with the average's weights in place. At the end the parameters are the
        average's. Raises Stopped after Ctrl-C, when the state is saved.
        """
        options, metrics = self.options, self.run_dir / "metrics.jsonl"
        if processes.is_main():
            drop_repeated(metrics, self.stage, self.step)
        with stop_signals() as received, self._bar() as bar:
            started, first = time.perf_counter(), self.step
            while self.step < self.num_steps:
                for micro in range(options.accumulate):
                    processes.average_gradients(self.wrapped, micro == options.accumulate - 1)
                    yield self.step, step_generator(options.seed, self.stage, self.step, micro)
                rate = self._optimise()
                bar.update()
                last = self.step == self.num_steps
                if self.step % options.log_every == 0 or last:
                    loss, now = self.check_loss(), time.perf_counter()
                    self.loss_sum.zero_()
                    self.loss_count = 0
                    bar.set_postfix(loss=f"{loss:.4f}", rate=f"{rate:.1e}")
                    if processes.is_main():
                        entry = {"stage": self.stage, "step": self.step, "loss": loss,
                                 "learning_rate": rate,
                                 "steps_per_second": (self.step - first) / (now - started)}
                        with full_disk(metrics, metrics), open(metrics, "ab") as file:
                            file.write(json.dumps(entry).encode() + b"\n")
                    started, first = now, self.step
                stopping = self._stopping(received)
                if self.step % options.save_every == 0 or last or stopping:
                    self.save_state()
                # After the state, which a preview that fails shall not cost, and before a stop.
                previewing = preview and self.step % options.preview_every == 0 and not last
                if previewing and processes.is_main():
                    with self.average.swapped():
                        preview(self.step)
                if stopping:
                    raise Stopped(f"stopped at step {self.step} of the {self.stage} stage; "
                                  "continue with --resume")
        torch._foreach_copy_(self.average.parameters, self.average.values)

    def backward(self, loss):
        """Add the gradients of a batch's loss to those of its step."""
        loss = loss / self.options.accumulate
        loss.backward()
        # The sum stays on the device: reading it here would make every step wait.
        self.loss_sum += loss.detach()

    def _optimise(self):
        """One optimizer step with the gradients of its batches. Returns the learning rate."""
        rate = learning_rate_at(self.step, self.num_steps, self.learning_rate,
                                self.options.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["part"]
        torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        if self.plan.moments_on_cpu:
            step_in_parts(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.step)
        self.loss_count += 1
        self.step += 1
        return rate

    def _bar(self):
        return tqdm(total=self.num_steps, initial=self.step, desc=f"{self.stage:5}", unit="step",
                    disable=not processes.is_main() or "TQDM_DISABLE" in os.environ,
                    dynamic_ncols=True, smoothing=0.1)

    def _stopping(self, received):
        """Whether any process got a signal: all have to stop after the same step."""
        if processes.rank_and_count()[1] == 1:
            return bool(received)
        # Asking the others waits for them, and torchrun kills all 30 s after a signal. The last
        # step asks, too: its stage forgets the signals.
        if self.step % min(self.options.log_every, 10) and self.step < self.num_steps:
            return False
        return processes.mean(torch.tensor(float(len(received)), device=self.device)) > 0

    def save_state(self):
        """Everything that the next step needs, in one file, if loss and weights are finite."""
        self.check_loss()
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            self._refuse("model", "when it was saved last")
        state = {
            "stage": self.stage, "step": self.step, "processes": processes.rank_and_count()[1],
            "threads": torch.get_num_threads(),
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average.values, "optimizer": self.optimizer.state_dict(),
        }
        if processes.is_main():
            with atomic(self.state_path, self.state_bytes) as file:
                torch.save(state, file)

    def load_state(self, state):
        """Continue from what save_state wrote."""
        count = processes.rank_and_count()[1]
        if state.get("processes", count) != count:  # states of older versions do not say
            raise ValueError(f"{self.state_path}: is of a training with {state['processes']} "
                             f"processes, this one has {count}; resume it with as many")
        if [p.shape for p in state["parameters"]] != [p.shape for p in self.parameters] or (
            state["step"] > self.num_steps
        ):
            raise ValueError(f"{self.state_path}: belongs to a model of another configuration")
        threads, now = state.get("threads"), torch.get_num_threads()
        if self.device.type == "cpu" and threads not in (None, now) and processes.is_main():
            print(f"{self.state_path}: is of a training with {threads} threads, this one has "
                  f"{now}: it goes on; only with as many it would end with the same bits",
                  file=sys.stderr)
        self.step = state["step"]
        # Rates and betas follow from the options, whatever a state says. load_state_dict would put
        # all moments on the GPU, also if they live in CPU memory.
        for number, moments in state["optimizer"]["state"].items():
            parameter = self.parameters[number]
            place = "cpu" if self.plan.moments_on_cpu else parameter.device
            self.optimizer.state[parameter] = {
                "step": moments["step"].to(parameter.device),
                "exp_avg": moments["exp_avg"].to(place),
                "exp_avg_sq": moments["exp_avg_sq"].to(place),
            }
        torch._foreach_copy_(self.average.parameters, state["parameters"])
        torch._foreach_copy_(self.average.values, state["average"])

    def check_loss(self):
        """The mean loss since the last look at it. Reading it waits for the device."""
        mean = processes.mean(self.loss_sum) / max(1, self.loss_count)
        if not math.isfinite(mean):
            self._refuse("loss", f"at most {self.loss_count} steps ago")
        return mean

    def _refuse(self, what, before):
        raise ValueError(
            f"the {what} of the {self.stage} stage is not finite at step {self.step} (it was "
            f"{before}); nothing of it is saved: remove {self.state_path} "
            f"if it exists, and start the stage anew with a lower --{self.stage}-learning-rate"
        )
