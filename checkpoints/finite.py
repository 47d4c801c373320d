"""NaN and infinity: which tensors of a model hold them, and which network's output does."""


def require_finite(pipeline, path):
    """Raise ValueError that names the tensors of a model from `path` that hold NaN or infinity."""
    damaged = {name: None for (part, ours), name in pipeline.report.used.items()
               if not getattr(pipeline, part).get_parameter(ours).float().isfinite().all()}
    if damaged:
        raise ValueError(f"{path}: holds NaN or infinity in {', '.join(damaged)}; use another copy "
                         "or version of the model")


def decode_finite(pipeline, prompts, latents):
    """pipeline.decode(latents). Raises ValueError that names the network that gave NaN."""
    clips = pipeline.decode(latents)  # b t 3 h w
    if clips.isfinite().all():
        return clips
    context = pipeline.encode_text([*prompts, ""])
    outputs = {"text encoder": context, "U-Net": latents, "autoencoder": clips}
    part = next(name for name, output in outputs.items() if not output.isfinite().all())
    raise ValueError(f"the {part} gives NaN or infinity; `python -m checkpoints MODEL` shows "
                     "whether the model's file is damaged")
