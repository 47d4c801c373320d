"""One training loop for every stage: optimise, average, report, save, and continue after a stop.

A stage computes its loss and hands it over; the loop does the rest:

    for step, generator in trainer.steps():
        ...
        trainer.backward(loss)

All randomness of a batch comes from that generator, which is seeded with (seed, stage, step, batch
of the step, process). So no random state has to be saved, and a resumed run sees the batches that
it would have seen without the stop. The training state is one file, replaced as a whole.
"""

import hashlib
import math
import os
import time

import torch
from tqdm import tqdm

from support.cli import stop_signals
from support.devices import (is_main, loss_scaler, mean, move_moments, rank_and_count,
                             step_in_parts, wrap)

WEIGHT_DECAY = 0.01  # AdamW's, PyTorch's default
GRADIENT_CLIP = 1.0  # largest norm of the gradient of all parameters
LOG_EVERY = 50  # steps between lines of metrics.jsonl
MAX_TRIES = 40  # of a step in float16, each with half the loss scale of the one before


class Stopped(KeyboardInterrupt):
    """Raised for Ctrl-C or SIGTERM at the end of a step, after everything is saved."""


def step_generator(seed, stage, step, micro=0):
    """A CPU generator for everything random in a batch of this process."""
    rank, count = rank_and_count()
    text = f"{seed} {stage} {step * count + rank} {micro}"
    # A fixed hash of the text; Python's hash() differs from run to run.
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(number)


def learning_rate_at(step, num_steps, peak, warmup_steps):
    """Half a cosine from the peak down to (almost) 0, times a linear warm-up."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))  # up to 1
    return peak * warmup * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))


class Trainer:
    """Takes a stage of a run to its end, from its beginning or from a saved state.

    `groups` are [(parameters, multiplier of their learning rate), ...].
    """

    def __init__(self, run, stage, groups):
        options = self.options = run.options
        self.run, self.stage, self.step = run, stage, 0
        self.num_steps = getattr(options, f"{stage}_steps")  # steps of the optimizer, not batches
        self.peak = getattr(options, f"{stage}_learning_rate")
        groups = [{"params": list(parameters), "multiplier": factor}
                  for parameters, factor in groups]
        self.parameters = [p for group in groups for p in group["params"]]  # as AdamW numbers them
        # The averaged weights draw better than the latest ones; decay 0 keeps no average.
        self.average = [p.detach().clone() for p in self.parameters] if options.ema_decay else []
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.99),
                                           weight_decay=WEIGHT_DECAY, fused=True)
        self.losses, self.skipped = [], 0  # batches since the last report; skipped in this step
        self.scaler = loss_scaler(run.device, options.precision)  # has an effect in float16 only
        if run.state is not None:
            self.load_state(run.state)
            run.state = None  # the following stages start from their beginning

    def wrap(self, network):
        """The network to call in a step, compiled if asked for; processes average its gradients."""
        wrapped = wrap(network)
        if self.options.compile:  # around DDP, which averages gradients during backward()
            wrapped.compile(dynamic=False)
        return wrapped

    def steps(self, preview=None, num_previews=4):
        """Yield (step, generator) for each batch; answer each with backward(loss).

        preview(step) is called num_previews times, the last time at the end, with the averaged
        weights in place. These also remain at the end. Raises Stopped after Ctrl-C, once the state
        is saved.
        """
        options = self.options
        due = {self.num_steps * i // num_previews for i in range(1, num_previews + 1)}
        due = due - {0} if preview else ()

        def draw():
            if self.step in due and is_main():
                self.swap_average()
                preview(self.step)
                self.swap_average()

        self.run.begin(self.stage, self.step)
        with stop_signals() as received, tqdm(
            total=self.num_steps, initial=self.step, desc=f"{self.stage:5}", unit="step",
            disable=not is_main() or "TQDM_DISABLE" in os.environ, dynamic_ncols=True, smoothing=0.1
        ) as bar:
            draw()  # at a resume, because a kill may have prevented it after its state was saved
            started, first = time.perf_counter(), self.step
            while self.step < self.num_steps:
                for micro in range(self.skipped, self.skipped + options.accumulate):
                    yield self.step, step_generator(options.seed, self.stage, self.step, micro)
                rate = self.optimise()  # optimizer.step() is in here
                if self.skipped:  # float16 overflowed, so try this step again with other batches
                    continue
                bar.update()
                last = self.step == self.num_steps  # of the stage
                if self.step % LOG_EVERY == 0 or last:
                    loss, now = self.mean_loss(), time.perf_counter()
                    bar.set_postfix(loss=f"{loss:.4f}", rate=f"{rate:.1e}")
                    self.run.log({"stage": self.stage, "step": self.step, "loss": loss,
                                  "learning_rate": rate,
                                  "steps_per_second": (self.step - first) / (now - started)})
                    started, first = now, self.step  # of the next interval
                stopping = bool(received)
                if rank_and_count()[1] > 1:  # all stop after the same step; torchrun waits 30 s
                    stopping = mean(torch.tensor(float(len(received)), device=self.run.device))
                if self.step % options.save_every == 0 or last or stopping or self.step in due:
                    self.save_state()
                draw()  # after saving, so a failing preview loses nothing
                if stopping:
                    raise Stopped(f"stopped at step {self.step} of the {self.stage} stage; "
                                  "continue with --resume")
        self.swap_average()

    def backward(self, loss):
        """Add the gradients of a batch's loss to the step's gradients."""
        self.scaler.scale(loss / self.options.accumulate).backward()
        self.losses.append(loss.detach())  # stays on the device; reading it would stall the step

    def optimise(self):
        """One step of AdamW and of the average, unless skipped. Returns the learning rate."""
        rate = learning_rate_at(self.step, self.num_steps, self.peak, self.options.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["multiplier"]
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, GRADIENT_CLIP)
        self.scaler.update()  # halves the scale after an overflow, doubles it after 2,000 steps
        if self.scaler.is_enabled() and not norm.isfinite():  # the one wait for the device
            self.optimizer.zero_grad()
            del self.losses[-self.options.accumulate :]
            self.skipped += self.options.accumulate
            self.check(self.skipped < MAX_TRIES * self.options.accumulate)
            return rate
        self.skipped = 0
        if self.options.offload:
            step_in_parts(self.optimizer)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()  # frees the gradients
        if self.average:
            # The decay warms up, because a constant one would keep the random initialisation for a
            # long time. Karras et al. 2022, appendix F, discuss it for diffusion.
            decay = min(self.options.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.step += 1
        return rate

    @torch.no_grad()
    def swap_average(self):
        """Exchange the weights and their average, one by one to save memory."""
        for parameter, average in zip(self.parameters, self.average, strict=False):
            kept = parameter.clone()
            parameter.copy_(average)  # the network has the average
            average.copy_(kept)  # and the average the network's weights

    def mean_loss(self):
        """The mean loss since the last call. Raises ValueError if it is not finite."""
        loss = mean(torch.stack(self.losses).mean())
        self.losses.clear()
        self.check(math.isfinite(loss))
        return loss

    def check(self, finite):
        if not finite:
            raise ValueError(f"the {self.stage} stage diverged by step {self.step}: its loss, "
                             "gradients or weights are not finite, so they are not saved; remove "
                             "training_state.pt if it exists, and start it again with a lower "
                             f"--{self.stage}-learning-rate or with --precision fp32")

    def save_state(self):
        """Save everything that the next step needs. Raises ValueError unless weights are finite."""
        self.check(all(bool(parameter.isfinite().all()) for parameter in self.parameters))
        self.run.save_state({
            "stage": self.stage, "step": self.step,
            "parameters": [p.detach() for p in self.parameters], "average": self.average,
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
        })

    def load_state(self, state):
        """Continue from a state that save_state saved. Raises ValueError if shapes differ."""
        if [p.shape for p in state["parameters"]] != [p.shape for p in self.parameters]:
            raise ValueError("training_state.pt: belongs to a model of another configuration")
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state.get("scaler") or self.scaler.state_dict())
        if self.options.offload:
            move_moments(self.optimizer, self.parameters, "cpu")
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, state["parameters"])
            if self.average:
                torch._foreach_copy_(self.average, state["average"])
