"""The training loop by itself, on a line y = a x + b that takes no time to fit."""

import itertools
import math
import signal

import pytest
import torch
from torch import nn

import trainer
from support import devices
from support.devices import step_in_parts
from trainer import Stopped, Trainer, learning_rate_at, step_generator
from training.options import TrainOptions


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)


def points(generator):
    x = torch.randn(4, generator=generator)
    return x, 3 * x + 2


class Line:
    """A run, its trainer, and the line that they fit: b learns at a tenth of the rate."""

    def __init__(self, draw=points, num_steps=6, state=None, **options):
        self.options = TrainOptions(**{"save_every": 2, "warmup_steps": 0, "vae_steps": num_steps,
                                       "vae_learning_rate": 0.1} | options)
        self.device, self.state = torch.device("cpu"), state
        self.states, self.metrics, self.losses, self.draw = {}, [], [], draw
        self.a, self.b = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.0))
        self.trainer = Trainer(self, "vae", [([self.a], 1.0), ([self.b], 0.1)])

    def save_state(self, state):
        state = state | {"parameters": [p.item() for p in state["parameters"]],
                         "average": [p.item() for p in state["average"]]}
        self.states[state["step"]] = state

    def log(self, entry):
        self.metrics.append(entry)

    def begin(self, stage, step):
        pass

    def fit(self, preview=None, num_previews=4):
        for _, generator in self.trainer.steps(preview, num_previews):
            x, y = self.draw(generator)
            loss = (self.a * x + self.b - y).square().mean()
            self.losses.append(loss.item())
            self.trainer.backward(loss)
        return self

    def weights(self):
        return self.a.item(), self.b.item()


# One step


def test_the_learning_rate_rises_and_falls_as_worked_out_by_hand():
    rates = [learning_rate_at(step, 100, 2.0, 10) for step in (0, 4, 9, 50, 99)]
    assert rates == pytest.approx([
        0.2, 1.0 * (0.5 + 0.5 * math.cos(0.04 * math.pi)), 1 + math.cos(0.09 * math.pi), 1.0,
        1 + math.cos(0.99 * math.pi),
    ])
    assert learning_rate_at(0, 100, 2.0, 0) == 2.0  # without warm-up


def adamw(value, gradients, rates, decay, betas):
    """Loshchilov & Hutter 2019, algorithm 2, for one number."""
    m = v = 0.0
    for i, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = betas[0] * m + (1 - betas[0]) * gradient
        v = betas[1] * v + (1 - betas[1]) * gradient**2
        update = (m / (1 - betas[0] ** i)) / (math.sqrt(v / (1 - betas[1] ** i)) + 1e-8)
        value -= rate * decay * value + rate * update
    return value


def test_the_weights_are_those_of_adamw_by_hand_with_clipped_gradients():
    line, gradients = Line(num_steps=5, warmup_steps=2), []
    step = line.trainer.optimizer.step
    line.trainer.optimizer.step = lambda: (
        gradients.append([line.a.grad.item(), line.b.grad.item()]), step())
    line.fit()
    assert [math.hypot(*both) for both in gradients] == pytest.approx(5 * [1.0], rel=1e-4)
    rates = [learning_rate_at(i, 5, 0.1, 2) for i in range(5)]
    for i, (start, factor) in enumerate([(0.5, 1.0), (0.0, 0.1)]):
        expected = adamw(start, [both[i] for both in gradients],
                         [factor * rate for rate in rates], decay=0.01, betas=(0.9, 0.99))
        assert line.states[5]["parameters"][i] == pytest.approx(expected, rel=1e-5)


def test_accumulated_batches_make_the_step_of_one_large_batch():
    steps = iter(range(100))

    def both(_):
        step = next(steps)
        pair = [points(step_generator(0, "vae", step, micro)) for micro in (0, 1)]
        return [torch.cat(parts) for parts in zip(*pair, strict=True)]

    halves, whole = Line(accumulate=2).fit(), Line(both).fit()
    assert halves.weights() == pytest.approx(whole.weights(), rel=1e-4)
    assert halves.metrics[-1]["loss"] == pytest.approx(whole.metrics[-1]["loss"], rel=1e-5)


# The average


def test_the_average_equals_a_loop_by_hand():
    line = Line(num_steps=7, save_every=1, ema_decay=0.3).fit()
    expected = 0.5
    for step in range(1, 8):
        # The decay warms up: (1 + step) / (10 + step), counted from 0, until it is 0.3.
        decay = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3, 0.3][step - 1]
        expected = decay * expected + (1 - decay) * line.states[step]["parameters"][0]
        assert line.states[step]["average"][0] == pytest.approx(expected, rel=1e-6)


def test_a_stage_ends_with_its_average_or_with_decay_0_as_it_is():
    line, plain = Line().fit(), Line(ema_decay=0.0).fit()
    assert list(line.weights()) == line.states[6]["average"] != line.states[6]["parameters"]
    assert list(plain.weights()) == plain.states[6]["parameters"] and not plain.states[6]["average"]


# Previews, metrics, states


def test_previews_come_at_each_quarter_with_the_average_after_saving():
    line, seen = Line(num_steps=9, save_every=1), []
    line.fit(lambda step: seen.append((step, [*line.weights()], line.states[step]["average"])))
    assert [step for step, *_ in seen] == [2, 4, 6, 9]
    assert all(drawn == average for _, drawn, average in seen)
    assert line.weights() == Line(num_steps=9).fit().weights()  # they leave no trace
    seen.clear()
    Line(num_steps=9).fit(seen.append, num_previews=2)
    assert seen == [4, 9]


@pytest.mark.parametrize("step", [2, 9])
def test_a_preview_that_a_kill_prevented_is_drawn_at_the_resume(tmp_path, step):
    def kill(at):
        if at == step:
            raise KeyboardInterrupt

    line, seen = Line(num_steps=9), []
    line.save_state = lambda state: torch.save(state, tmp_path / "state.pt")
    with pytest.raises(KeyboardInterrupt):
        line.fit(kill)
    Line(num_steps=9, state=torch.load(tmp_path / "state.pt")).fit(seen.append)
    assert seen == [n for n in (2, 4, 6, 9) if n >= step]


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_short_stage_has_a_preview_at_its_end_and_none_before_its_beginning(num_steps):
    seen = []
    Line(num_steps=num_steps).fit(seen.append)
    assert seen == list(range(1, num_steps + 1))


def test_metrics_have_the_mean_loss_of_each_interval():
    line = Line(num_steps=5).fit()
    seen = line.losses
    assert [entry["step"] for entry in line.metrics] == [2, 4, 5]
    assert [entry["loss"] for entry in line.metrics] == pytest.approx(
        [(seen[0] + seen[1]) / 2, (seen[2] + seen[3]) / 2, seen[4]])


def test_metrics_have_the_speed_since_the_last_line(monkeypatch):
    clock = iter([10.0, 14.0, 15.0])  # the start, step 2, step 3
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(clock))
    line = Line(num_steps=3).fit()
    assert [entry["steps_per_second"] for entry in line.metrics] == [2 / 4, 1 / 1]


def test_states_are_saved_every_n_steps_and_at_the_end():
    assert list(Line(num_steps=7, save_every=3).fit().states) == [3, 6, 7]


def test_a_loss_that_is_not_finite_ends_the_stage_before_it_is_saved():
    draws = iter([1.0, 1.0, math.nan, 1.0])
    line = Line(lambda generator: (torch.ones(4), torch.full((4,), next(draws))))
    with pytest.raises(ValueError, match="the vae stage diverged by step 4"):
        line.fit()
    assert list(line.states) == [2]


# float16


@pytest.mark.parametrize("accumulate, bad, batches", [(1, (2, 3), 2), (2, (3,), 2)])
def test_a_step_that_overflows_float16_is_no_step_but_tried_again_with_other_batches(
        accumulate, bad, batches):
    def overflowing(generator):
        tries.append(0)
        x, y = points(generator)
        return x, y + (math.inf if len(tries) in bad else 0)

    def expected(generator):  # the second step's batches come after those that overflowed
        micros.append(line.trainer.step)
        again = step_generator(0, "vae", 1, batches + micros.count(1) - 1)
        return points(again if micros[-1] == 1 else generator)

    tries, micros = [], []
    half = Line(overflowing, precision="fp16", accumulate=accumulate).fit()
    line = Line(expected, accumulate=accumulate)
    assert half.weights() == line.fit().weights()
    assert half.states[6]["parameters"] == line.states[6]["parameters"]
    assert [entry["loss"] for entry in half.metrics] == [entry["loss"] for entry in line.metrics]
    assert half.states[6]["scaler"]["scale"] == 2.0 ** (16 - len(bad))


def test_a_run_whose_every_step_overflows_float16_ends_and_names_the_way_out(monkeypatch):
    monkeypatch.setattr(trainer, "MAX_TRIES", 3)
    line = Line(lambda generator: (torch.ones(4), torch.tensor(math.inf)), precision="fp16",
                accumulate=2)
    with pytest.raises(ValueError, match="diverged by step 0: .* or with --precision fp32"):
        line.fit()
    assert len(line.losses) == 6 and not line.states and line.weights() == (0.5, 0.0)


# Offloading


def test_a_step_in_parts_is_the_step(monkeypatch):
    monkeypatch.setattr(devices, "PART", 2)
    weights = [torch.randn(3, 5), torch.randn(7), torch.randn(2, 2), torch.randn(4)]
    copies = [[nn.Parameter(weight.clone()) for weight in weights] for _ in range(2)]
    optimizers = [torch.optim.AdamW([{"params": each[:3]}, {"params": each[3:], "lr": 0.1}],
                                    lr=0.01, fused=True) for each in copies]
    moved = []
    monkeypatch.setattr(devices, "move_moments",
                        lambda optimizer, part, device: moved.append((len(part), str(device))))
    for _ in range(3):
        for a, b in zip(*copies, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        optimizers[0].step()
        step_in_parts(optimizers[1])
    assert all(torch.equal(a, b) for a, b in zip(*copies, strict=True))
    assert moved == 3 * [(2, "cpu"), (2, "cpu"), (1, "cpu"), (1, "cpu"), (1, "cpu"), (1, "cpu")]
    assert [len(group["params"]) for group in optimizers[1].param_groups] == [3, 1]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_offload_leads_to_the_same_weights_in_parts(monkeypatch, precision):
    parts, step = [], trainer.step_in_parts
    monkeypatch.setattr(trainer, "step_in_parts", lambda optimizer: (parts.append(1),
                                                                     step(optimizer)))
    assert Line().fit().weights() == Line(offload=True, precision=precision).fit().weights()
    assert len(parts) == 6


# Randomness


def test_a_batch_depends_on_seed_stage_step_and_micro_batch_alone():
    keys = [(0, "vae", 1, 0), (1, "vae", 1, 0), (0, "image", 1, 0), (0, "vae", 2, 0),
            (0, "vae", 1, 1), (0, "vae", 1)]
    draws = [torch.randn(3, generator=step_generator(*key)).tolist() for key in keys]
    assert draws[5] == draws[0] and len({*map(tuple, draws)}) == 5


def test_processes_draw_different_batches(monkeypatch):
    seeds = set()
    for rank in range(3):
        monkeypatch.setattr(trainer, "rank_and_count", lambda rank=rank: (rank, 3))
        seeds |= {step_generator(0, "vae", step).initial_seed() for step in range(4)}
    assert len(seeds) == 12


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_its_step_with_state_and_preview(number):
    def draw(generator):
        if line.trainer.step == 3:
            signal.raise_signal(number)
        return points(generator)

    line, seen = Line(draw, num_steps=8, save_every=100), []
    with pytest.raises(Stopped, match="stopped at step 4 of the vae stage; continue with --resu"):
        line.fit(seen.append)
    assert list(line.states) == [2, 4] and seen == [2, 4]


def test_a_signal_during_a_preview_stops_after_the_next_step():
    line = Line(num_steps=8, save_every=100)
    with pytest.raises(Stopped, match="stopped at step 3"):
        line.fit(lambda step: signal.raise_signal(signal.SIGINT))
    assert list(line.states) == [2, 3]


def test_a_second_ctrl_c_stops_at_once():
    def draw(generator):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    line = Line(draw)
    with pytest.raises(KeyboardInterrupt) as stop:
        line.fit()
    assert stop.type is KeyboardInterrupt and not line.states


def test_a_signal_to_another_process_stops_this_one(monkeypatch):
    monkeypatch.setattr(trainer, "rank_and_count", lambda: (0, 2))
    monkeypatch.setattr(trainer, "mean", lambda value: value.item() + 0.5)
    with pytest.raises(Stopped, match="stopped at step 1 of"):
        Line().fit()


# Continuing


@pytest.mark.parametrize("before, after", [*itertools.product(["fp32", "fp16"], repeat=2)])
def test_a_resume_goes_on_bit_for_bit_in_any_precision(tmp_path, before, after):
    whole = Line(save_every=100, precision=after).fit()
    stopped, saved = Line(precision=before), tmp_path / "state.pt"
    stopped.save_state = lambda state: torch.save(state, saved) if state["step"] == 4 else None
    stopped.fit()
    resumed = Line(state=torch.load(saved, weights_only=True), precision=after).fit()
    if before == after:  # the scaler counts the steps since its scale changed
        assert resumed.trainer.scaler.state_dict() == whole.trainer.scaler.state_dict()
    assert resumed.weights() == whole.weights() and len(resumed.losses) == 2
    assert resumed.state is None  # the next stage starts from its beginning


def test_the_state_of_another_network_is_refused():
    state = {"parameters": [torch.zeros(3), torch.zeros(())]}
    with pytest.raises(ValueError, match="training_state.pt: belongs to a model of another"):
        Line(state=state)


# Compiling


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return x * self.weight / 2


def test_a_compiled_network_learns_the_same_under_its_own_names(monkeypatch):
    compile_, graphs, learned = nn.Module.compile, [], []

    def backend(graph, inputs):  # dynamo's graphs and guards, no C++ compiler
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile",
                        lambda module, **options: compile_(module, backend=backend, **options))
    for wanted in (False, True):
        network = Half()
        forward = Line(compile=wanted).trainer.wrap(network)
        for rows in (4, 3):
            forward(torch.ones(rows, 1)).square().mean().backward()
        learned.append({name: network.get_parameter(name).grad for name in network.state_dict()})
        assert len(graphs) == 2 * wanted  # one for each shape
    assert learned[0] == learned[1] == {"weight": torch.tensor([1.5 / 2 * 2])}
