"""A network for local losses: patches mixed by linear layers, every one of them between two normalisations."""

import math
from collections.abc import Sequence

from torch import Tensor, nn


class LocalMixer(nn.Sequential):
    """Patches, `depth` mixing blocks, the mean over patches, a linear output; after Ren et al. 2023 (arXiv:2210.03310).

    Blocks are links of one `nn.Sequential`, so that `method=local` gives each a loss of its own. Normalisations stand
    before and after every linear layer and have no parameters: for noisy gradients they matter far more than for exact
    ones.

    Args:
        input_shape: (channels, height, width).
        num_classes: number of outputs.
        patch_size: height and width of a patch; must divide those of the image.
        channels: numbers per patch.
        depth: number of mixing blocks.
    """

    def __init__(
        self, input_shape: Sequence[int], num_classes: int, patch_size: int = 2, channels: int = 64, depth: int = 2
    ) -> None:
        in_channels, height, width = input_shape
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size must divide the image, got {patch_size} for {height} x {width}")
        num_patches = math.prod((height // patch_size, width // patch_size))
        super().__init__(
            nn.Conv2d(in_channels, channels, patch_size, stride=patch_size),
            nn.Flatten(2),
            nn.LayerNorm([channels, num_patches], elementwise_affine=False),
            *(MixerBlock(channels, num_patches) for _ in range(depth)),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.LayerNorm(channels, elementwise_affine=False),
            nn.Linear(channels, num_classes),
        )


class MixerBlock(nn.Module):
    """(B, C, T) to the same: patches are mixed, then channels, each added to what came in.

    Args:
        channels: C.
        num_patches: T.
    """

    def __init__(self, channels: int, num_patches: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm([channels, num_patches], elementwise_affine=False)
        self.patches = nn.Linear(num_patches, num_patches)
        self.channels = nn.Linear(channels, channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.patches(self.norm(x)))
        y = self.relu(self.channels(self.norm(x).transpose(1, 2))).transpose(1, 2)
        return x + self.norm(y)
