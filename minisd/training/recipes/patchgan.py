"""The discriminator that sharpens the autoencoder: real or reconstructed, patch by patch (Isola et al. 2017)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Pictures 'b 3 h w' → logits 'b 1 h' w'', each of a patch; positive says real.

    Strided convolutions of width channels·(1, 2, 4, …). Group norm where the original has batch norm: a picture's
    verdict must depend neither on its neighbours in the batch nor on how many processes share it.
    """

    def __init__(self, channels: int = 32, layers: int = 3, *, norm_groups: int = 8):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, width) in enumerate(pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            blocks += [nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False)]
            blocks += [nn.GroupNorm(norm_groups, width), nn.LeakyReLU(0.2)]
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        return self.blocks(image)
