"""Other positions and amounts of the temporal shift, which compare.py trains beside layers.py's.

layers.py shifts a third of the channels each way after conv1, as the paper draws it, and optionally
also after conv2. The names of PLACES are:

    front1, front2    in front of conv1, in front of conv2
    front             in front of both
    end               after conv2 alone, at the end of the residual branch
    quarter           after conv1, a quarter of the channels each way
    past              after conv1, only the third from the frame before
"""

import torch.nn.functional as F

from layers import ResnetBlock, per_frame
from shift import move, temporal_shift


def quarter(x):
    """A quarter of the channels of x (b, t, c, ...) from either neighbour."""
    return temporal_shift(x, x.shape[2] // 4)


def past(x):
    """A third of the channels of x (b, t, c, ...) from the frame before; the others stay."""
    if x.shape[1] == 1:  # an image
        return x
    return move(x, to_next=slice(x.shape[2] // 3), to_previous=slice(0))


PLACES = {  # {name: {position in a block's branch: the shift there}}
    "front1": {"front of conv1": temporal_shift},
    "front2": {"front of conv2": temporal_shift},
    "front": {"front of conv1": temporal_shift, "front of conv2": temporal_shift},
    "end": {"after conv2": temporal_shift},
    "quarter": {"after conv1": quarter},
    "past": {"after conv1": past},
}


class PlacedBlock(ResnetBlock):
    """A ResnetBlock that shifts at the positions in its attribute `place`, a value of PLACES."""

    def shift(self, position, x):
        return self.place[position](x) if position in self.place else x

    def forward(self, x, time):
        branch = self.shift("front of conv1", F.silu(per_frame(self.norm1, x)))
        branch = self.shift("after conv1", per_frame(self.conv1, branch))
        time = self.time_emb_proj(time)[:, None, :, None, None]  # b d -> b 1 c 1 1
        if self.scale_shift:
            scale, offset = time.chunk(2, dim=2)
            branch = per_frame(self.norm2, branch) * (1 + scale) + offset
        else:
            branch = per_frame(self.norm2, branch + time)
        branch = self.shift("front of conv2", F.silu(branch))
        branch = self.shift("after conv2", per_frame(self.conv2, branch))
        return per_frame(self.conv_shortcut, x) + branch


def place_shift(unet, name):
    """Give a U-Net of temporal="none" the shift of that name, or none for None; returns it."""
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock)]
    for block in blocks if name else []:
        block.__class__, block.place = PlacedBlock, PLACES[name]  # the weights stay as they are
    return unet
