"""A network for local losses: patches mixed by linear layers, every one of them between two normalisations."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fgtrain.network.chains import SideBySide


class LocalMixer(nn.Sequential):
    """Patches, `depth` mixing blocks, the mean over patches, a linear output; after Ren et al. 2023 (arXiv:2210.03310).

    Blocks are links of one `nn.Sequential`, and the groups of channels within a block are modules side by side, so that
    `method=local` gives every group of every block a loss of its own. Normalisations stand before and after every
    linear layer and have no parameters: for noisy gradients they matter far more than for exact ones.

    Args:
        input_shape: (channels, height, width).
        num_classes: number of outputs.
        patch_size: height and width of a patch; must divide those of the image.
        channels: numbers per patch.
        depth: number of mixing blocks.
        groups: of channels; must divide them.

    Raises:
        ValueError: inputs that are no images; patches or groups that do not fit.
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
    """(B, C, T) to (B, S, T): all channels are mixed into the group's, then its patches, each added to what is there.

    Args:
        channels: C.
        num_patches: T.
        group: which of the channels are the group's S.
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
    """(B, C, T) to (B, classes): the mean over patches, normalised, and a linear layer.

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
