"""The networks that files hold, each declared once.

A new checkpoint family of these networks is a preset in `config.PRESETS`: files are recognised by their U-Net's shapes.
A new network is one file here that declares a `NetworkFormat`, and a line in `NETWORKS`: from it follow detection,
loading, saving in every layout, and `minisd inspect`.
"""

from minisd.checkpoints.networks.clip import TEXT, VISION
from minisd.checkpoints.networks.control import CONTROL
from minisd.checkpoints.networks.format import NetworkFormat
from minisd.checkpoints.networks.unet import UNET
from minisd.checkpoints.networks.vae import VAE

NETWORKS: dict[str, NetworkFormat] = {declared.name: declared for declared in (UNET, VAE, TEXT, VISION, CONTROL)}
WHOLE = ("unet", "vae", "text", "vision")  # the networks that ModelConfig describes

__all__ = ["NETWORKS", "WHOLE", "NetworkFormat"]
