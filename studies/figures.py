"""The pictures of docs/lesson.md, drawn from a trained run.

    python -m studies.figures runs/demo --long runs/long
    python -m studies.figures runs/demo --only shift,reach --output my_pictures

One function draws one picture. What it shows of the inside of a model is measured in inside.py.
All seeds are fixed, so a run gives the same pictures each time, pixel by pixel.
"""

import argparse
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import ImageColor

from cli import run_main
from diffusion import Diffusion
from evaluate import choose_prompts, draw, recognise
from media.write import enlarge, to_uint8, write_clip
from metrics import psnr
from papers.chains import Chain
from papers.known_frames import load_model
from papers.scores import long_clips
from papers.train_known_frames import LongRun
from run import read_record
from shapes import HELD_OUT, caption_of
from shift import temporal_shift
from studies.curves import COLOURS
from studies.inside import (MEASURED, as_variant, attention_of, denoise, draw_prompt, last_modules,
                            load, losses_of, measure, operations_of, path_of, previews_of, reach_of,
                            without_third)
from studies.page import read_metrics
from studies.sheets import new_figure, pixels, save, show
from vae import encode_clip
from weights import load_unet

SHOWN = HELD_OUT[2]  # the combination that most pictures show; training has never seen it
SEED = 3  # of its noise
TITLE = f'"{caption_of(*SHOWN)}", the same noise each time; numbers: of {MEASURED} clips'
LOSS_CLIPS, LOSS_LEVELS = 24, 11
LONG_CLIPS, LONG_FRAMES = 8, 400


def draw_one(model):
    """A clip (t, 3, h, w) of the combination SHOWN, always from the same noise."""
    return draw_prompt(model, caption_of(*SHOWN), SEED)


# The pictures, in the order of the lesson


def shift(run, output):
    """The number of its frame in place of each channel, before the shift and after it."""
    t, c = 6, 9
    before = torch.arange(1, t + 1)[None, :, None].expand(1, t, c)  # b t c
    after = temporal_shift(before)  # 0 where there is no such frame
    paint = np.array([ImageColor.getrgb(colour) for colour in ("#E8E8E8", *COLOURS[:t])])
    figure = new_figure(3.9)
    for i, (axes, x) in enumerate(zip(figure.subplots(1, 2), (before, after), strict=True)):
        axes.imshow(paint[x[0]])
        for (frame, channel), origin in np.ndenumerate(x[0].numpy()):
            axes.text(channel, frame, origin, ha="center", va="center", fontweight="bold",
                      color="white" if origin == 1 else "black")  # readable on its colour
        axes.hlines(np.arange(1, t) - 0.5, -0.5, c - 0.5, "white", linewidth=3)
        axes.vlines(np.arange(1, c) - 0.5, -0.5, t - 0.5, "white", capstyle="projecting",
                    clip_on=False, linewidth=[8 if i and n % 3 == 0 else 2 for n in range(1, c)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="channel", xticks=range(c), xticklabels=range(1, c + 1),
                 ylabel="frame", yticks=range(t), yticklabels=range(1, t + 1))
    figure.axes[0].set_title("before: every frame has its own channels\n\n", fontsize=11)
    figure.axes[1].set_title("after: two thirds come from its neighbours\n\n", fontsize=11)
    for third, name in enumerate(("from the\nframe before", "from the\nframe after", "its own")):
        figure.axes[1].text(3 * third + 1, -0.6, name, ha="center", va="bottom", fontsize=9)
    save(figure, output / "shift.png")


def reach(run, output):
    """How far a frame sees after each block, measured by gradients."""
    num_layers = len(list(last_modules(run.video.unet)))
    t = 4 * num_layers + 9  # two shifts in a block: it sees 2 frames further, each way
    unets = {"none": run.image.unet, "shift": run.video.unet, "attention": run.image.unet}
    figure = new_figure(4)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (temporal, unet) in zip(panels, unets.items(), strict=True):
        strength = reach_of(as_variant(unet, temporal, t), t)
        relative = (strength / strength.amax(1, keepdim=True)).log10().numpy()  # -inf: white
        image = axes.imshow(relative, cmap="viridis", vmin=-8, vmax=0, aspect="auto",
                            extent=(-t / 2, t / 2, num_layers + 0.5, 0.5))
        for n, seen in enumerate((strength > 0).sum(1).tolist(), 1):
            axes.text(t / 2 + 0.7, n, seen, va="center", fontsize=9)
        axes.text(t / 2 + 0.7, 0.4, "sees", fontsize=9)
        axes.set_title(temporal, fontsize=11)
        axes.set(xlabel="frame, from the middle one", yticks=range(1, num_layers + 1))
    panels[0].set_ylabel("after so many blocks")
    figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=40,
                    label="log10 of the gradient, the strongest of a row is 0; white: no path")
    save(figure, output / "reach.png")


def latents(run, output):
    """What the autoencoder makes of frames, and what a step of diffusion costs there."""
    model, clip = run.video, run.clips(2)[0][1]
    z = encode_clip(model.vae, 127.5 * (clip + 1))  # t c h w
    decoded, channels = model.decode(z[None])[0], range(z.shape[1])
    gray = [enlarge((z[:, [i, i, i]] / 3).clamp(-1, 1), model.vae.config.downscale)
            for i in channels]
    figure = new_figure(6.2)
    top, bottom = figure.subplots(2, 1, height_ratios=(5, 2))
    show(top, [clip, *gray, decoded],
         ["frames", *(f"latents, channel {i + 1}" for i in channels),
          f"decoded: {psnr(decoded, clip).mean():.1f} dB"],
         f"A frame of {clip[0].numel():,} numbers, its {z[0].numel():,} latents, and back")
    costs = operations_of(model, clip[:1], z[:1])
    bars = bottom.barh(range(4)[::-1], [cost / 1e6 for cost in costs.values()],
                       color=[COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[0]])
    bottom.bar_label(bars, fmt="{:,.1f}", padding=3)
    bottom.set_yticks(range(4)[::-1], costs)
    bottom.margins(x=0.1)
    bottom.spines[["top", "right"]].set_visible(False)
    bottom.set(xlabel="million operations a frame")
    save(figure, output / "latents.png")


def noise(run, output):
    """A frame at rising noise levels, in pixels and in latents, and the schedules."""
    model, diffusion, frame = run.video, run.video.diffusion, run.clips(2)[0][1, :1]
    levels = torch.linspace(0, diffusion.num_train_timesteps - 1, 9).long()
    noisy, noisy_latents = (
        diffusion.add_noise(
            x0.expand(len(levels), -1, -1, -1),
            torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED)), levels)
        for x0 in (frame, encode_clip(model.vae, 127.5 * (frame + 1))))
    figure = new_figure(5.8)
    top, bottom = figure.subplots(2, 1)
    colours = enlarge((noisy_latents[:, :3] / 3).clamp(-1, 1), model.vae.config.downscale)
    show(top, [noisy.clamp(-1, 1), colours, model.decode(noisy_latents[None])[0]],
         ["noise on pixels", "noise on latents", "the same, decoded"],
         "A frame disappears in noise (this run's schedule)", "timestep", levels.tolist())
    schedules = {"Stable Diffusion": Diffusion(), "the same with zero terminal SNR": Diffusion(
        prediction_type="v_prediction", rescale_betas_zero_snr=True), "this run": diffusion}
    for (name, schedule), colour, style in zip(schedules.items(), COLOURS, ("-", "--", "-"),
                                               strict=False):
        snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
        bottom.plot(snr.log10(), color=colour, linestyle=style, linewidth=2,
                    label=f"{name}: SNR {snr[-1]:.2g} at the end")
    bottom.set(xlabel="timestep", ylabel="log10 of the SNR", ylim=(-5, 3.5))
    bottom.set_title("Signal-to-noise ratio (SNR) of a timestep", loc="left", fontsize=11)
    bottom.grid(alpha=0.3)
    bottom.legend(loc="lower left")
    save(figure, output / "noise.png")


def denoising(run, output):
    """A clip after some of the steps, and the clip that the model expects there."""
    model = run.video
    steps = list(denoise(model, caption_of(*SHOWN), SEED))
    chosen = sorted({round(i) for i in np.linspace(0, len(steps) - 1, 6)})
    columns = range(0, model.sampling.num_frames, max(1, model.sampling.num_frames // 4))
    figure = new_figure(5.2)
    rows = [f"step {i + 1}, t = {steps[i][0]}" for i in chosen]
    for axes, part, title in zip(figure.subplots(1, 2), (1, 2), (
            "x_t: what the sampler holds", "x0: what the model expects to get"), strict=True):
        clips = model.decode(torch.cat([steps[i][part] for i in chosen]))[:, columns]
        show(axes, clips, rows if part == 1 else [], title, columns=[i + 1 for i in columns])
    figure.suptitle(f'"{caption_of(*SHOWN)}", {len(steps)} steps, decoded at some of them')
    save(figure, output / "denoising.png")


def guidance(run, output):
    """The same noise with more and more weight of the text."""
    settings = {f"guidance {scale}": {"guidance_scale": float(scale)} for scale in (1, 2, 3, 4, 6)}
    settings["6, SNR <= 0.2"] = {"guidance_scale": 6.0, "guidance_max_snr": 0.2}
    models = [run.with_unet(run.video.unet, **{"guidance_max_snr": None} | fields)
              for fields in settings.values()]
    t = run.options.num_frames
    rows = [f"{name}\n{measure(model, t)}" for name, model in zip(settings, models, strict=True)]
    figure = new_figure(5.4)
    show(figure.subplots(), [draw_one(model) for model in models], rows, TITLE)
    save(figure, output / "guidance.png")


def words(run, output):
    """Where in the frames each word of the prompt is looked for."""
    clip, maps = attention_of(run.video, caption_of(*SHOWN), SEED)
    names = ["(start)", *caption_of(*SHOWN).split()]
    last = f"{len(maps) - len(names)} x (end)"
    maps = torch.cat([maps[: len(names)], maps[len(names) :].sum(0, keepdim=True)])
    low, high = (extreme(maps, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    heat = (2 * (maps - low) / (high - low) - 1)[:, :, None].expand(-1, -1, 3, -1, -1)
    shares = 100 * maps.mean((1, 2, 3))
    rows = [f"{name}: {share:.1f} %" for name, share in
            zip([*names, last], shares, strict=True)]
    figure = new_figure(6.6)
    show(figure.subplots(), [clip, *heat], ["the clip", *rows],
         "Attention of places to words; white: a word's most, black: its least")
    save(figure, output / "words.png")


def training(run, output):
    """From the image model to the video model: a clip at some steps, and the loss."""
    prompt, clips = previews_of(run)
    figure = new_figure(5.6)
    top, bottom = figure.subplots(2, 1, height_ratios=(len(clips), 2))
    show(top, list(clips.values()), [f"{step:,} steps" for step in clips],
         f'"{prompt}", the same noise after so many training steps')
    steps, losses, _ = zip(*read_metrics(run.path)["video"], strict=True)
    bottom.plot(steps, losses, color=COLOURS[0])
    bottom.set(xlabel="training step", xlim=(0, None),
               ylabel="mean squared\nerror of v", ylim=(0, None))
    save(figure, output / "training.png")


def without(run, output):
    """The trained model with parts of the shift taken out, and with more frames."""
    t, model = run.options.num_frames, run.video
    none = run.with_unet(load_unet(run.path / "unet", "none"))
    cases = {"as trained": (model, nullcontext()), "no shift": (none, nullcontext()),
             "without the past": (model, without_third(0)),
             "without the future": (model, without_third(1)),
             "own third set to 0": (model, without_third(2))}
    clips, rows = [], []
    for name, (changed, context) in cases.items():
        with context:
            clips.append(draw_one(changed))
            rows.append(f"{name}\n{measure(changed, t)}")
    longer = run.with_unet(model.unet, num_frames=2 * t)
    clips += draw_one(longer).split(t)
    rows += [f"{2 * t} frames at once\n{measure(longer, 2 * t)}", "and its second half"]
    figure = new_figure(6.2)
    show(figure.subplots(), clips, rows, TITLE)
    save(figure, output / "without.png")


def held_out(run, output):
    """The combinations that training has never seen, as a moving grid."""
    clips = draw(run.video, HELD_OUT, run.options.num_frames, SEED, len(HELD_OUT))
    figure, images = new_figure(6.8, dpi=100), []
    for axes, clip, prompt in zip(figure.subplots(3, 4).flat, clips, HELD_OUT, strict=True):
        images.append(axes.imshow(to_uint8(clip)[0], interpolation="nearest"))
        seen = recognise((clip.double().numpy() + 1) / 2)
        axes.set_title(caption_of(*prompt).replace(" moving", "\nmoving"), fontsize=10)
        axes.set_xlabel("recognised" if seen == prompt else "taken for: {} {} {}".format(*seen),
                        color=COLOURS[2] if seen == prompt else COLOURS[1])
        axes.set(xticks=[], yticks=[])
    figure.suptitle("Twelve combinations that were not in the training data")
    frames = []
    for i in range(clips.shape[1]):
        for image, clip in zip(images, clips, strict=True):
            image.set_data(to_uint8(clip)[i])
        frames.append(torch.from_numpy(pixels(figure).copy()).permute(2, 0, 1) / 127.5 - 1)
        figure.set_layout_engine("none")  # where things are does not change
    write_clip(output / "held_out.gif", torch.stack(frames), run.options.frames_per_second)


def loss(run, output):
    """The loss at each noise level: image and video model, with and without text."""
    clips, captions = run.clips(LOSS_CLIPS)
    x0 = torch.stack([encode_clip(run.video.vae, 127.5 * (clip + 1)) for clip in clips])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(SEED))
    levels = torch.linspace(0, run.video.diffusion.num_train_timesteps - 1, LOSS_LEVELS).long()
    axes = (figure := new_figure(4.4)).subplots()
    for (name, model), colour in zip({"image": run.image, "video": run.video}.items(), COLOURS,
                                     strict=False):
        for texts, what, style in (([""] * len(x0), "no text", "--"), (captions, "with text", "-")):
            axes.plot(levels, losses_of(model, x0, eps, texts, levels), style, color=colour,
                      marker="o", label=f"{name} model, {what}")
    axes.set(xlabel="timestep: on the left almost no noise, on the right nothing else",
             ylabel="mean squared error of v", ylim=(0, None))
    axes.set_title(f"Loss on {len(x0)} clips that training has not seen", loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, output / "loss.png")


def long(run, output, path):
    """A long clip of a run for known frames, its path, and how far clips drift from theirs."""
    model, (options, _) = load_model(path).to("cpu"), read_record(path, LongRun)
    chain = Chain(options.num_frames, options.num_known, model.sampling.frames_per_second)
    prompts = choose_prompts(LONG_CLIPS)
    clips, _ = long_clips(model, chain, prompts, SEED, LONG_FRAMES, plain=options.plain_captions)
    places, truths, drifts = zip(*map(path_of, clips, prompts), strict=True)
    shown = np.argsort(np.mean(drifts, 1))[LONG_CLIPS // 2]  # neither the best nor the worst
    figure = new_figure(6.4)
    top, middle, bottom = figure.subplots(3, 1, height_ratios=(1, 2, 2))
    some = range(0, LONG_FRAMES, LONG_FRAMES // 10)
    show(top, [clips[shown, some]], [""], f'"{caption_of(*prompts[shown])}", {LONG_FRAMES} frames, '
         f"{chain.num_frames} at a time", columns=[i + 1 for i in some])
    middle.plot(places[shown], color=COLOURS[0], label="the clip")
    middle.axhline(truths[shown].min(), color="gray", linestyle=":")  # where its centre turns back
    middle.axhline(truths[shown].max(), color="gray", linestyle=":", label="turns at the walls")
    middle.plot(truths[shown], "--", color=COLOURS[1], linewidth=1,
                label="its first 8 frames, continued at their speed")
    start = "top" if prompts[shown][2] in ("up", "down") else "left"
    middle.set(xlabel="frame", ylabel=f"its centre: pixels\nfrom the {start}",
               xlim=(0, LONG_FRAMES), ylim=(0, clips.shape[-1]))
    middle.legend(loc="upper right", ncols=3)
    bottom.plot(np.transpose(drifts), color="lightgray")
    bottom.plot(np.median(drifts, 0), color=COLOURS[0], linewidth=2,
                label=f"median of {LONG_CLIPS} clips (gray)")
    bottom.set(xlabel="frame", xlim=(0, LONG_FRAMES),
               ylabel="drift across its\nmotion, pixels", ylim=(0, None))
    bottom.legend(loc="upper left")
    save(figure, output / "long.png")


FIGURES = {function.__name__: function for function in (
    shift, reach, latents, noise, denoising, guidance, words, training, without, held_out, loss,
    long)}


def main():
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/lesson.md from a run.",
                                     allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="finished run on MovingShapes")
    parser.add_argument("--long", type=Path, metavar="RUN", help="run of papers.long_video, for "
                        "the picture of a long clip (default: leave it out)")
    parser.add_argument("--only", help=f"some of {','.join(FIGURES)}")
    parser.add_argument("--output", type=Path, default=Path("docs/lesson"), metavar="FOLDER",
                        help="(default: docs/lesson)")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [n for n in FIGURES if n != "long" or args.long]
    unknown = [name for name in names if name not in FIGURES]
    if unknown or ("long" in names and not args.long):
        raise ValueError(f"--only needs some of {', '.join(FIGURES)}, and long needs --long RUN; "
                         f"got {args.only!r}")
    torch.set_flush_denormal(True)
    run = load(args.run)
    for name in names:
        with torch.no_grad():
            FIGURES[name](run, args.output, *([args.long] if name == "long" else []))
        print(name, flush=True)


if __name__ == "__main__":
    run_main(main)
