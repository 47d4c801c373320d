"""The grader of exercises/ accepts the project's own functions and refuses typical mistakes."""

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers import ROOT
from torch.nn.init import ones_, zeros_

from diffusion import Diffusion, classifier_free_guidance
from exercises import test_stubs as grader
from layers import ResnetBlock
from shift import temporal_shift
from temporal import AttentionOverTime
from tokenizer import CLIPTokenizer
from vae import DiagonalGaussian


def schedule(alpha_bar, kind="v_prediction"):
    alpha_bar = alpha_bar.double() if kind == "v_prediction" else alpha_bar[alpha_bar > 0].double()
    betas = 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
    return Diffusion(len(betas), prediction_type=kind, trained_betas=tuple(betas.tolist()),
                     set_alpha_to_one=True)


def frames_seen(frame, num_frames, num_blocks):
    blocks = [ResnetBlock(6, 6, 2, 1e-5, shifts=1) for _ in range(num_blocks)]
    x = torch.randn(1, num_frames, 6, 2, 2, requires_grad=True)
    torch.nn.Sequential(*blocks)(x)[:, frame].sum().backward()
    return x.grad.flatten(2).any(2).sum().item()  # frames with a gradient


def ddim_step(x0, eps, a, t, t_prev, eta, noise):
    own = schedule(a, "epsilon")
    with patch("diffusion.randn", lambda *_: noise):
        inputs = eps, own.add_noise(x0, eps, t), t, t_prev
        return own.ddpm_step(*inputs) if eta == 1 else own.ddim_step(*inputs, eta)


class Attention(AttentionOverTime):
    def forward(self, x):  # b t c h w -> b t (h w) c and back
        y = super().forward(x.flatten(3).transpose(2, 3)).transpose(2, 3)
        return x + y.unflatten(3, x.shape[3:])

    def fill(self, init):
        for p in self.parameters():
            init(p)
        return self


OWN = SimpleNamespace(
    temporal_shift=temporal_shift, frames_seen=frames_seen,
    noise_and_target=lambda x0, eps, a, t: (schedule(a).add_noise(x0, eps, t),
                                            schedule(a).target(x0, eps, t)),
    predict_x0=lambda output, x_t, a, t, kind: schedule(a, kind).predict(output, x_t, t)[0],
    ddim_step=ddim_step,
    guided_prediction=lambda model, x, t, text, empty, scale: classifier_free_guidance(
        model(x, t, empty), model(x, t, text), scale),
    kl_divergence=lambda mean, logvar: DiagonalGaussian(mean, logvar).kl(),
    AttentionOverTime=lambda channels: Attention(channels, 1),
    merge_word=lambda word, merges: [CLIPTokenizer(merges).tokens[i]
                                     for i in CLIPTokenizer(merges).encode(word)])
MISTAKES = {  # {words of the grader's sentence: (function, a typical mistake)}
    "in place": ("temporal_shift", lambda x: x.copy_(temporal_shift(x))),
    "past and future": ("temporal_shift", lambda x: temporal_shift(x.flip(2)).flip(2)),
    "before frame 0": ("frames_seen", lambda frame, num_frames, n: 2 * n + 1),
    "each side": ("frames_seen", lambda frame, num_frames, n: n + 1),
    "its root": ("noise_and_target", lambda x0, eps, a, t: OWN.noise_and_target(x0, eps, a**2, t)),
    "v should be": ("noise_and_target", lambda *x: [OWN.noise_and_target(*x)[0]] * 2),
    "x_t is 0.8": ("predict_x0", lambda *x: OWN.predict_x0(*x[:4], "v_prediction")),
    "from v": ("predict_x0", lambda *x: OWN.predict_x0(*x[:4], "epsilon")),
    "the noisiest": ("ddim_step", lambda *x: ddim_step(*x[:4], x[4] % 2, *x[5:])),
    "variance": ("ddim_step", lambda *x: ddim_step(*x[:5], 0.0, x[6])),
    "'s w gives 5.*got 5": ("guided_prediction", lambda *x: OWN.guided_prediction(*x[:5], x[5] + 1)),
    "texts give 1.*got 1": ("guided_prediction", lambda *x: OWN.guided_prediction(*x[:3], x[4], x[3], x[5])),
    "sum a half": ("kl_divergence", lambda *x: OWN.kl_divergence(*x) / 42),
    "already": ("kl_divergence", lambda mean, logvar: OWN.kl_divergence(mean, 2 * logvar)),
    "identity": ("AttentionOverTime", lambda channels: Attention(channels, 1).fill(ones_)),
    "never learn": ("AttentionOverTime", lambda channels: Attention(channels, 1).fill(zeros_)),
    "suffix": ("merge_word", lambda *x: [y.removesuffix("</w>") for y in OWN.merge_word(*x)]),
    "has made": ("merge_word", lambda word, merges: OWN.merge_word(word, merges[:1])),
}


@pytest.mark.parametrize("exercise", grader.CASES)
def test_the_projects_own_function_is_right(exercise):
    grader.grade(OWN, exercise)


@pytest.mark.parametrize("words", MISTAKES)
def test_a_typical_mistake_gets_a_sentence_that_names_it(words):
    name, mistake = MISTAKES[words]
    with pytest.raises(pytest.fail.Exception, match=words):
        exercise = next(exercise for exercise, cases in grader.CASES.items() if name in cases)
        grader.grade(SimpleNamespace(**{name: mistake}), exercise)


def test_each_stub_gets_the_line_not_written_yet():
    todo = (ROOT / "exercises/stubs.py").read_text().count("raise NotImplementedError")
    command = [sys.executable, "-m", "pytest", "-q", "exercises"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert sum("not written yet (exercises/stubs.py:" in line for line in lines) == todo
    assert todo < 9 or len(lines) == 11  # 9 between pytest's own two, before you solve some
