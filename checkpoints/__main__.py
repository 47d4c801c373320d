"""Say what a checkpoint is, and convert it to a folder in diffusers' layout.

    python -m checkpoints v1-5-pruned.safetensors                       # what is it?
    python -m checkpoints v2-1_768-ema-pruned.ckpt --merges bpe.txt.gz --convert models/sd21
"""

from pathlib import Path

from checkpoints.finite import require_finite
from checkpoints.weights import add_checkpoint_flags, load_pipeline, save_pipeline
from support.cli import Parser, run_main


def describe(pipeline):
    """Lines that describe a model and say which tensors of its file were used."""
    unet, tokenizer, diffusion = pipeline.unet.config, pipeline.tokenizer, pipeline.diffusion
    ours = unet.class_embed_type or unet.resnet_time_scale_shift != "default"
    version = "2.x" if unet.use_linear_projection else "1.x"
    lines = [
        "this project's own" if ours else f"Stable Diffusion {version}",
        f"predicts {diffusion.prediction_type}"
        f"{', zero terminal SNR' * (not diffusion.alphas_cumprod[-1])}",
        f"{tokenizer.vocab_size} tokens" if tokenizer else "no tokenizer; name one with --merges",
    ]
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        dtype = next(network.parameters()).dtype
        lines.append(f"{millions:.1f} M parameters, {dtype}: {network.config}")
    used, ignored, notes = pipeline.report
    reasons = [f"{count} ignored: {reason}" for reason, count in ignored.items()]
    return "\n".join([*lines, f"{len(set(used.values()))} tensors used", *reasons, *notes])


def main():
    parser = Parser(prog="python -m checkpoints", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, metavar="FILE", help="a single file, or a folder")
    add_checkpoint_flags(parser)
    parser.add_argument("--convert", type=Path, metavar="FOLDER",
                        help="write it into a new folder in diffusers' layout")
    args = parser.parse_args()
    target = args.convert
    if target and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"--convert {target}: exists already; name a new folder")
    pipeline = load_pipeline(args.path, None, args.merges, args.prediction_type, args.ema,
                             None, args.zero_terminal_snr)
    print(describe(pipeline))
    require_finite(pipeline, args.path)
    if target:
        save_pipeline(pipeline, target)
        print(f"written: {target}")


if __name__ == "__main__":
    run_main(main)
