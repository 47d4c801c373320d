"""What happens inside a trained model, as numbers: hooks, gradients and counts.

`figures.py` draws what these functions measure; each is an example of how to look into a model.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

import layers
from diffusion import randn
from evaluate import agreement, choose_prompts, crispness, draw, rates
from media.read import read_clip
from media.write import SEPARATOR
from model import UNet
from options import TrainOptions
from papers.bouncing import BASE_FRAMES, EXTENTS, ideal, track
from pipeline import Pipeline
from run import load_image_model, open_data, read_record
from shapes import SHAPES, MovingShapes
from shift import temporal_shift
from studies.costs import operations
from temporal import temporal_state
from train import denoising_loss
from transformer import TransformerBlock
from weights import load_pipeline, load_unet

MEASURED = 16  # clips that `measure` draws


@dataclass(frozen=True)
class Trained:
    """A finished run: its options, its video model, and the image model that this was."""

    path: Path
    options: TrainOptions
    image: Pipeline
    video: Pipeline

    def clips(self, count):
        """Real clips (count, t, 3, h, w) in [-1, 1] that training has not seen, and captions."""
        size = self.options.num_frames, self.options.image_size
        data = MovingShapes(count, *size, self.options.seed + 1)
        return torch.stack([frames for frames, _ in data]) / 127.5 - 1, data.captions

    def with_unet(self, unet, **sampling):
        """The video model with another U-Net and other fields of its Sampling."""
        return dataclasses.replace(self.video, unet=unet, sampling=dataclasses.replace(
            self.video.sampling, **sampling))


def load(path):
    """The Trained of a folder. Raises ValueError if it is no finished run with the shift."""
    options, finished = read_record(path)
    if "video" not in finished or (options.data, options.temporal) != ("shapes", "shift"):
        raise ValueError(f"{path}: needs a finished video stage with --temporal shift on --data "
                         "shapes; train one with `python train.py NEW_RUN`")
    image = load_image_model(path, "cpu", "fp32").to("cpu")
    return Trained(path, options, image, load_pipeline(path).to("cpu"))


def draw_prompt(model, prompt, seed):
    """A clip (t, 3, h, w) in [-1, 1] of a prompt."""
    *_, latents = model.sample([prompt], [seed])
    return model.decode(latents)[0]


def measure(model, num_frames):
    """Drawn clips as a line of text: how many are right in all, how far the shape moves, ..."""
    prompts = choose_prompts(MEASURED)
    clips = draw(model, prompts, num_frames, 1000, MEASURED)
    paths = [track(clip, shape).centres for clip, (_, shape, _) in zip(clips, prompts, strict=True)]
    travel = np.nanmean([np.linalg.norm(path[-1] - path[0]) for path in paths])
    overlap = np.mean([crispness(clip, shape)
                       for clip, (_, shape, _) in zip(clips, prompts, strict=True)])
    right = rates(agreement(clips, prompts))["all"]
    return f"{right:.0f} % right\nmoves {travel:.1f} px\ncrispness {overlap:.2f}"


def as_variant(unet, temporal, num_frames, seed=0):
    """A U-Net's weights in one with other temporal layers, which are new and never exactly 0."""
    torch.manual_seed(seed)
    other = UNet(dataclasses.replace(unet.config, temporal=temporal, max_frames=num_frames))
    other.load_state_dict(unet.state_dict() | temporal_state(other))
    for name, parameter in other.named_parameters():
        if "temporal" in name and not parameter.any():  # where 0 would let nothing pass
            torch.nn.init.normal_(parameter, std=0.1)
    return other


def last_modules(unet):
    """The last module of each layer of a U-Net, in the order of the forward pass."""
    for level in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for i in range(len(level.resnets)):
            parts = (level.resnets, level.attentions, level.temporal)
            yield [part[i] for part in parts if i < len(part)][-1]


def reach_of(unet, num_frames, seed=0):
    """How much each layer's middle frame depends on each frame of the input: (layers, frames).

    It is the norm of a gradient, exactly 0 where no path leads from one to the other.
    """
    outputs, generator = [], torch.Generator().manual_seed(seed)
    hooks = [module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
             for module in last_modules(unet)]
    size = 2 * unet.config.downscale  # places make no difference, so few of them do
    x = torch.randn(1, num_frames, unet.config.in_channels, size, size, generator=generator)
    context = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    with torch.enable_grad():
        unet(x.requires_grad_(), torch.tensor([500]), context)
        gradients = [torch.autograd.grad(output[:, num_frames // 2].square().sum(), x,
                                         retain_graph=True)[0] for output in outputs]
    for hook in hooks:
        hook.remove()
    return torch.stack([gradient[0].flatten(1).norm(dim=1) for gradient in gradients])


def attention_of(model, prompt, seed):
    """(clip (t, 3, h, w), attention (n, t, h, w) of its places to each token of the prompt).

    The mean over heads, layers and denoising steps; over tokens it sums to 1 at each place.
    """
    t, maps = model.sampling.num_frames, []

    def look(attention, inputs, output):
        x, context = (y[-1] for y in inputs)  # the last with the text, the one before without
        q, k = (y.unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)  # heads places d/heads
                for y in (attention.to_q(x), attention.to_k(context)))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0).T  # n (t h w)
        size = round((weights.shape[1] / t) ** 0.5)
        weights = weights.unflatten(1, (t, size, size))
        maps.append(F.interpolate(weights, size=2 * [model.sampling.image_size]))

    hooks = [block.attn2.register_forward_hook(look) for block in model.unet.modules()
             if isinstance(block, TransformerBlock)]
    *_, latents = model.sample([prompt], [seed])
    for hook in hooks:
        hook.remove()
    return model.decode(latents)[0], torch.stack(maps).mean(0)


def denoise(model, prompt, seed):
    """Yield (t, x_t, x0) at each denoising step: what the sampler holds, what it expects to get.

    A DDIM step mixes x0 and eps anew: x_t = a x0 + s eps at t, and likewise at the next timestep.
    These are two equations for both.
    """
    def mixture(t):
        final = 1.0 if diffusion.set_alpha_to_one else diffusion.alphas_cumprod[0].item()
        alpha_bar = diffusion.alphas_cumprod[t].item() if t >= 0 else final
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    diffusion, sampling = model.diffusion, dataclasses.replace(model.sampling, sampler="ddim",
                                                               eta=0.0)
    size = sampling.image_size // model.vae.config.downscale
    shape = 1, sampling.num_frames, model.unet.config.in_channels, size, size
    x_t = randn(shape, [torch.Generator().manual_seed(seed)])  # as model.sample draws it
    pairs = diffusion.timestep_pairs(sampling.num_steps, sampling.timestep_power)
    for (t, t_next), x_next in zip(pairs, model.sample([prompt], [seed], sampling), strict=True):
        (a, s), (a_next, s_next) = mixture(t), mixture(t_next)
        yield t, x_t, (s * x_next - s_next * x_t) / (s * a_next - s_next * a)
        x_t = x_next


def without_third(third):
    """A context in which the shift lacks a third: 0 the past, 1 the future, 2 the frame itself.

    Channels that would come from a neighbour stay the frame's own; those that are its own are 0.
    """
    def shift(x, fold=None, causal=False):
        fold = x.shape[2] // 3 if fold is None else fold
        moved = temporal_shift(x, fold, causal).clone()
        channels = slice(third * fold, (third + 1) * fold if third < 2 else None)
        moved[:, :, channels] = x[:, :, channels] if third < 2 else 0
        return moved

    return patch.object(layers, "temporal_shift", shift)


def operations_of(model, frame, latents):
    """Operations of each part for one frame (1, 3, h, w) and its latents (1, c, h/f, w/f)."""
    unet, vae, context, t = model.unet, model.vae, model.encode_text([""]), torch.tensor([500])
    in_pixels = UNet(dataclasses.replace(unet.config, in_channels=3, out_channels=3))
    calls = {"encode, once": (vae.encode, frame),
             "U-Net on pixels, each step": (in_pixels, frame[None], t, context),
             "U-Net on latents, each step": (unet, latents[None], t, context),
             "decode, once": (vae.decode, latents)}
    return {what: sum(operations(*call).values()) for what, call in calls.items()}


def losses_of(model, x0, noise, texts, levels):
    """The loss of clips x0 (b, t, c, h, w) with their texts, at each of some timesteps."""
    context = model.encode_text(texts)
    return [denoising_loss(model.unet, model.diffusion, x0, noise, level.expand(len(x0)), context)
            for level in levels]


def previews_of(run, number=4):
    """(prompt, {step: clip (t, 3, h, w)}) of one of the nine clips that training draws as previews.

    Step 0, the image model with the shift, and the last step are drawn here, from the same noise.
    """
    size = run.options.image_size
    prompts = list(dict.fromkeys(open_data(run.options).captions))
    prompt = prompts[number * max(1, len(prompts) // 9)]  # as run.draw_previews chooses them
    start = load_unet(run.path / "image_unet", "shift")
    clips = {0: draw_prompt(run.with_unet(start), prompt, number)}
    y, x = ((size + SEPARATOR) * i for i in divmod(number, 3))  # in the grid of a preview
    for path in sorted((run.path / "previews").glob("video-*.gif")):
        frames = torch.from_numpy(read_clip(path)[0]).movedim(-1, 1)  # t h w 3 -> t 3 h w
        clips[int(path.stem.split("-")[1])] = frames[:, :, y : y + size, x : x + size] / 127.5 - 1
    return prompt, clips | {run.options.video_steps: draw_prompt(run.video, prompt, number)}


def path_of(clip, combination):
    """Where the shape of a clip (t, 3, h, w) is, in pixels, (t,) each.

    Its place along its motion, the place that follows from the first 8 frames at constant speed,
    and how far it is from its first place across its motion.
    """
    _, shape, direction = combination
    seen, axis = track(clip, shape), int(direction in ("up", "down"))
    radius = np.sqrt(seen.areas[:BASE_FRAMES].mean() / SHAPES[shape])
    truth = ideal(seen, axis, radius * EXTENTS[shape][axis], len(clip), clip.shape[-1])
    across = seen.centres[:, 1 - axis]
    return seen.centres[:, axis], truth, np.abs(across - across[:BASE_FRAMES].mean())
