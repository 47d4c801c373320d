"""Nine exercises in the lesson's order: replace each NotImplementedError by 3 to 15 lines.

Clips are (b clips, t frames, c channels, h, w). Return a new tensor; never write into an argument.
alpha_bar (num_timesteps,) falls from almost 1 (clean) to 0 (noise). At a timestep,
    x_t = signal x0 + noise_scale eps,  signal = sqrt(alpha_bar),  noise_scale = sqrt(1 - alpha_bar)
"""

import torch  # noqa: F401, your functions may need it
from torch import nn


def temporal_shift(x):
    """1. Shift a third of the channels of x (b, t, c, h, w) forward in time, a third backward.

    With fold = c // 3, frame i of the result (b, t, c, h, w) has along its channels
        [ frame i-1's first fold | its own middle, unchanged | frame i+1's last fold ]
    with zeros from beyond the clip's ends. A clip of one frame, an image, stays as it is. Autograd
    finds the gradient, the opposite shift. Latent-Shift 3.2; lesson "The shift"; shift.py.
    """
    raise NotImplementedError


def frames_seen(frame, num_frames, num_blocks):
    """2. Predict the number of frames that a frame depends on after num_blocks blocks, an int.

    Each block convolves frame by frame, shifts as in exercise 1, and convolves again. `frame` is 0
    to num_frames - 1; it sees itself, too. Latent-Shift 3.2; lesson "How far a frame sees".
    """
    raise NotImplementedError


def noise_and_target(x0, eps, alpha_bar, timesteps):
    """3. Training: the noisy latents x_t (equation at the top) and the target v, a pair.

        v = signal eps - noise_scale x0
    x0, eps and the results are (b, t, c, h, w); timesteps (b,) int64 has one timestep per clip.
    DDPM, eq. 4; Salimans & Ho 2022, appendix D; lesson "Noise"; diffusion.py.
    """
    raise NotImplementedError


def predict_x0(output, x_t, alpha_bar, t, prediction_type):
    """4. Sampling: the x0 that a model's output implies; all are (b, t, c, h, w), t is an int.

    output is eps if prediction_type is "epsilon", and v if it is "v_prediction". Solve exercise 3's
    equations for x0. From v it takes no division, so it also works where alpha_bar is 0.
    DDIM, eq. 9; Salimans & Ho 2022, appendix D; lesson "Denoising"; diffusion.py.
    """
    raise NotImplementedError


def ddim_step(x0, eps, alpha_bar, t, t_prev, eta, noise):
    """5. Sampling: a step from timestep t to the less noisy t_prev. Returns (b, t, c, h, w).

    x0, eps (the model's guesses) and noise have that shape. a is alpha_bar at t, a_prev at t_prev:
        sigma = eta sqrt((1 - a_prev) / (1 - a)) sqrt(1 - a / a_prev)
        result = sqrt(a_prev) x0 + sqrt(1 - a_prev - sigma^2) eps + sigma noise
    t_prev = -1 is the end, without noise: a_prev = 1. eta is 0 for DDIM, 1 for DDPM; t is an int.
    DDIM, eq. 12 and 16; DDPM, eq. 6 and 7; lesson "Denoising"; diffusion.py.
    """
    raise NotImplementedError


def guided_prediction(model, x_t, t, context, empty, guidance_scale):
    """6. Sampling: classifier-free guidance of x_t (b, t, c, h, w). Returns the same shape.

    model(x_t, t, context) predicts with the texts in context (b, n, d); empty (b, n, d) has the
    empty text in each row. Start at the prediction without text and go guidance_scale times the way
    to the prediction with it: 0 ignores the text, 1 is the plain model, more exaggerates.
    Ho & Salimans 2022, eq. 6 (w = guidance_scale - 1); lesson "Guidance"; diffusion.py.
    """
    raise NotImplementedError


def kl_divergence(mean, logvar):
    """7. The autoencoder's penalty, one number per image (n,), for mean and logvar (n, c, h, w).

    Each latent number is a Gaussian N(m, s^2), with logvar = log s^2. Sum over an image's numbers
        KL(N(m, s^2) | N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2
    LDM, Rombach et al. 2022, appendix G; lesson "Latents"; vae.py.
    """
    raise NotImplementedError


class AttentionOverTime(nn.Module):
    """8. The shift's rival: what each position attends to in all frames. A block adds it to x.

        to_out(softmax(q k^T / sqrt(c)) v),  q, k, v = to_q(x), to_k(x), to_v(x)
    x and the result are (b, t, n positions, c). For each clip and position, q, k, v are (t, c) and
    the weights (t, t), each row of sum 1. Before training the result is 0, so that x plus it is x
    and the image model stays whole. LVDM, He et al. 2022; lesson "What others do"; temporal.py.
    """

    def __init__(self, channels):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (
            nn.Linear(channels, channels) for _ in range(4))
        # Your line or two: the result is 0 before training, but the layer can learn.

    def forward(self, x):
        raise NotImplementedError


def merge_word(word, merges):
    """9. The tokens of a word by byte-pair encoding, a list of str.

    Start with one symbol per letter, the last with the suffix "</w>". Take the pairs in `merges` in
    their order; each joins all its neighbouring occurrences, from left to right. With the merges
    ("l", "o"), ("lo", "w</w>"), ("e", "r</w>"), "slower" becomes ["s", "lo", "w", "er</w>"].
    Sennrich et al. 2016; CLIP 2.4; README "Read it"; tokenizer.py.
    """
    raise NotImplementedError
