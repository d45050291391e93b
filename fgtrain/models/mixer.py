"""A network for local losses: linear layers mix patches and channels, each between two normalisations."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fgtrain.network.chains import SideBySide


class LocalMixer(nn.Sequential):
    """Patches, `depth` mixing blocks, the mean over patches, a linear output; after Ren et al. 2023 (arXiv:2210.03310).

    The blocks form one `nn.Sequential`, and the channel groups of a block are parallel modules, so that `method=local`
    gives every group of every block its own loss. Every linear layer has a normalisation without parameters before and
    after it. Normalisations matter far more for noisy gradients than for exact ones.

    Args:
        input_shape: (channels, height, width).
        num_classes: number of outputs.
        patch_size: height and width of a patch; must divide those of the image.
        channels: numbers per patch.
        depth: number of mixing blocks.
        groups: number of channel groups; must divide `channels`.

    Raises:
        ValueError: inputs are not images, depth is below 1, patches do not divide the image, or groups do not divide
            the channels.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        patch_size: int = 2,
        channels: int = 64,
        depth: int = 2,
        groups: int = 8,
    ) -> None:
        if len(input_shape) != 3:
            raise ValueError(f"LocalMixer takes images (C, H, W), got inputs of shape {tuple(input_shape)}")
        in_channels, height, width = input_shape
        if patch_size < 1 or height % patch_size or width % patch_size:
            raise ValueError(f"patch_size must divide the image, got {patch_size} for {height} x {width}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must divide the channels, got {groups} for {channels}")
        num_patches = math.prod((height // patch_size, width // patch_size))
        size = channels // groups
        super().__init__(
            nn.Conv2d(in_channels, channels, patch_size, stride=patch_size),
            nn.Flatten(2),
            nn.LayerNorm([channels, num_patches], elementwise_affine=False),
            *(
                SideBySide(MixerGroup(channels, num_patches, slice(i, i + size)) for i in range(0, channels, size))
                for _ in range(depth)
            ),
            MixerOutput(channels, num_classes),
        )


class MixerGroup(nn.Module):
    """Maps (B, C, T) to (B, S, T): mixes all channels into the group's S, then its patches, with residual connections.

    Args:
        channels: C.
        num_patches: T.
        group: the group's S channels.
    """

    def __init__(self, channels: int, num_patches: int, group: slice) -> None:
        super().__init__()
        self.group = group
        size = group.stop - group.start
        self.norm_input = nn.LayerNorm([channels, num_patches], elementwise_affine=False)
        self.channels = nn.Linear(channels, size)
        self.relu = nn.ReLU()
        self.norm = nn.LayerNorm([size, num_patches], elementwise_affine=False)
        self.patches = nn.Linear(num_patches, num_patches)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.relu(self.channels(self.norm_input(x).transpose(1, 2))).transpose(1, 2)
        x = x[:, self.group] + self.norm(mixed)
        return x + self.norm(self.patches(self.norm(x)))


class MixerOutput(nn.Module):
    """Maps (B, C, T) to (B, classes): the mean over patches, a normalisation and a linear layer.

    Args:
        channels: C.
        num_classes: number of outputs.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.mean(2)))
