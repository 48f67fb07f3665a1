"""Write tests/data/tiny.safetensors: an untrained model of 0.9 million parameters, with every network that SD has.

It draws coloured noise. Tests run on it; it is in the original layout and in float16.

    python scripts/make_tiny_checkpoint.py [OUT.safetensors]
"""

import argparse
import math

import torch

from minisd.checkpoints.load import Checkpoint
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.save import save_checkpoint
from minisd.config import CLIPTextConfig, ModelConfig, UNetConfig, VAEConfig

TINY = ModelConfig(
    name="tiny, untrained",
    unet=UNetConfig(
        channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(0, 1),
        num_heads=2,
        context_dim=8,
        norm_groups=8,
    ),
    vae=VAEConfig(channels=16, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=8),
    text=CLIPTextConfig(width=8, layers=2, heads=2, mlp_width=32),
    image_size=64,
)


def main(out: str) -> None:
    generator = torch.Generator().manual_seed(0)
    networks = {}
    for name, config in (("unet", TINY.unet), ("vae", TINY.vae), ("text", TINY.text)):
        networks[name] = NETWORKS[name].module(config)
        for key, parameter in networks[name].named_parameters():
            # matrices keep the variance of their input, norm weights are near 1, biases near 0
            noise = torch.randn(parameter.shape, generator=generator)
            gain = 1 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.05
            parameter.data = (gain * noise + (parameter.ndim == 1 and key.endswith("weight"))).half()
    checkpoint = Checkpoint(TINY, networks, {}, [], prediction_evidence="made with it")
    print(*save_checkpoint(checkpoint, out), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="tests/data/tiny.safetensors", help="file to write [%(default)s]")
    main(parser.parse_args().out)
