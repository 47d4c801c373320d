"""Does a training fit into a GPU's memory? Two steps of each stage show it before the first one."""

import dataclasses

import torch

from training.run import Run


class Rehearsal(Run):
    """A copy of a run that trains two steps per stage and keeps nothing."""

    def __init__(self, run):
        # AdamW makes its moments in the first step, so only the second one needs all the memory.
        two = {f"{stage}_steps": 2 for stage in run.options.stages}
        options = dataclasses.replace(run.options, **two, compile=False)  # compiling takes minutes
        vars(self).update(vars(run), state=None, options=options)  # __init__ would write files

    def keep_nothing(self, *_, **__):
        pass

    save_state = log = note = begin = keep_nothing
    save = finish = draw_previews = preview_vae = keep_nothing


def random_data(options, model):
    """(frames, latents, a function from captions to their context), of full shape."""
    model.vae.to("cpu")
    model.text_encoder.to("cpu")  # where they are while the U-Net learns
    size, config, encoder = options.image_size, model.vae.config, model.text_encoder.config
    frames = torch.randint(256, (1, 3, size, size), dtype=torch.uint8)
    small = size // config.downscale
    latents = [torch.randn(options.latent_frames, config.latent_channels, small, small)]
    context = torch.randn(1, encoder.max_position_embeddings, encoder.hidden_size)
    return frames, latents, lambda texts: context.expand(len(texts), -1, -1)


def try_stages(run, trials):
    """Call trials {stage: function of a run}; one that does not fit, with activations computed
    twice (run.checkpointing). Raises ValueError if it does not fit even then."""
    print("trying two steps of each stage, to see whether the memory suffices")
    for stage, train in trials.items():
        for checkpointing in (run.checkpointing, True):
            run.checkpointing = checkpointing
            try:
                train(Rehearsal(run))
                break
            except torch.OutOfMemoryError:
                pass  # the error keeps its tensors alive until here
            torch.cuda.empty_cache()
        else:
            raise ValueError(f"the {stage} stage does not fit into the GPU's memory; add --offload,"
                             f" lower --{stage}-batch-size, or start a new run with a lower "
                             "--num-frames or --image-size")
