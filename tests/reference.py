"""Reference outputs of the original implementations, and networks filled with the weights they were made with.

`data/networks_*.npz` holds outputs, and those inputs that `recipe.array` cannot make again; `data/manifests` the names
and shapes of the official files. Weights come from `recipe.py` alone: nobody's real weights are needed.
"""

from pathlib import Path

import numpy as np
import recipe
import torch

from minisd.checkpoints.keymaps import from_official, keymap

DATA = Path(__file__).parent / "data"


def manifest(name: str) -> dict:
    return recipe.load_manifest(DATA / "manifests" / f"{name}.json.gz")


def build(cls, config, manifest_name: str, prefix: str, dialect: str, variant: str = "standard"):
    """The network with the reference weights, every tensor of the manifest under that prefix used but positions."""
    weights = recipe.synthetic_state_dict(manifest(manifest_name), prefix=prefix, strip=True, variant=variant)
    with torch.device("meta"):
        network = cls(config)
    names = keymap(network, dialect)
    left = set(weights) - {source.key for source in names.values()}
    assert all(name.endswith(("position_ids", "logit_scale")) for name in left), left
    network.load_state_dict(from_official(lambda key: torch.from_numpy(weights[key]), names), assign=True)
    return network.eval()


def load(size: str, case: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / f"networks_{size}.npz") as arrays:
        own = {key.split("/")[1]: arrays[key] for key in arrays.files if key.split("/")[0] == case}
    return {name: torch.from_numpy(array) for name, array in own.items()}


def given(case: str, name: str, *shape: int) -> torch.Tensor:
    """An input of a reference case, made again from its name."""
    return torch.from_numpy(recipe.array(f"input:public:{case}:{name}", shape))
