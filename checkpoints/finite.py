"""NaN and infinity: which tensors of a model hold them, and which network gives them."""

from checkpoints.weights import PARTS


def not_finite(pipeline):
    """A line for each tensor of a loaded model that holds NaN or infinity; reads all weights."""
    lines, names = {}, pipeline.report.names
    for part in PARTS:
        for name, tensor in getattr(pipeline, part).state_dict().items():
            if count := int((~tensor.float().isfinite()).sum()):
                name = names.get((part, name), f"{part}/{name}")
                lines[name] = f"{name} holds NaN or infinity ({count:,} of {tensor.numel():,})"
    return list(lines.values())  # tensors of a single file may be several of ours


def require_finite(lines, path):
    """Raise ValueError if there are lines of not_finite()."""
    if lines:
        raise ValueError(f"{path}: {len(lines)} tensors are damaged: {'; '.join(lines[:3])}; "
                         f"`python -m checkpoints {path}` lists all")


def finite_clips(clips, pipeline, prompts, latents):
    """The clips drawn. Raises ValueError that names the first network whose output is not finite."""
    if clips.isfinite().all():
        return clips
    part = "autoencoder" if latents.isfinite().all() else "U-Net"
    if not pipeline.encode_text([*prompts, ""]).isfinite().all():
        part = "text encoder"
    raise ValueError(f"the output of the {part} is not finite; `python -m checkpoints PATH` names "
                     "the tensors of a model that hold NaN or infinity")
