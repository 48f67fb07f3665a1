"""Networks that run one at a time on a device. The CPU stands in for a GPU: copies are told by where they lie."""

import copy

import numpy as np
import pytest
import torch
from lively import lively
from PIL import Image

import minisd
from minisd.checkpoints.lora import Lora, LowRank, save_lora
from minisd.cli import main
from minisd.config import Settings
from minisd.tasks import memory, txt2img
from minisd.tasks.offload import Offload

PLAIN = lively("SD1")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
MASK = Image.fromarray(np.tile(np.uint8([0, 255]), (32, 16)))
TASKS = {
    "txt2img": lambda sd: sd.txt2img("a red apple", steps=2, num_images=2),
    "two passes": lambda sd: sd.txt2img("a red apple", steps=2, height=96, width=96, two_pass=0.5),
    "img2img": lambda sd: sd.img2img("a red apple", PICTURE, steps=2),
    "inpaint": lambda sd: sd.inpaint("a red apple", PICTURE, MASK, steps=2),
}


def offloaded(device="cpu"):
    sd = copy.deepcopy(PLAIN)
    sd.offload = Offload(device)
    return sd


def places(sd):
    return {name: {t.data_ptr() for t in network.parameters()} for name, network in sd.checkpoint.networks.items()}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_draws_the_same_pictures(name):
    for ours, plain in zip(TASKS[name](offloaded()), TASKS[name](PLAIN), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(plain))


def test_one_network_at_a_time_is_on_the_device_and_the_weights_never_leave_the_cpu():
    sd = offloaded()
    home = places(sd)
    seen = []

    def away(*_):
        seen.append(tuple(name for name, now in places(sd).items() if now != home[name]))

    for name in ("unet", "vae", "text"):
        leaf = {"unet": sd.unet.conv_in, "vae": sd.vae.decoder.conv_in, "text": sd.text_encoder.token_embedding}[name]
        leaf.register_forward_pre_hook(away)
    sd.txt2img("a red apple", steps=2)
    assert dict.fromkeys(seen) == dict.fromkeys([("text",), ("unet",), ("vae",)])
    sd.offload.rest()
    assert places(sd) == home


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_really_go_to_the_device():
    sd = offloaded("cuda")
    sd.bring(sd.unet)
    assert {t.device.type for t in sd.unet.parameters()} == {"cuda"}
    sd.bring(sd.vae)
    devices = {name: next(network.parameters()).device.type for name, network in sd.checkpoint.networks.items()}
    assert devices == {"unet": "cpu", "vae": "cuda", "text": "cpu"}


def test_what_changes_weights_is_not_lost_with_the_copies(tmp_path):
    sd, plain = offloaded(), copy.deepcopy(PLAIN)
    layer = "unet.down.0.attn.blocks.0.attn1.to_q"
    wide = sd.unet.get_parameter(layer.removeprefix("unet.") + ".weight").shape[0]
    lora: Lora = {layer: LowRank(torch.ones(2, wide), torch.ones(wide, 2), 2.0)}
    save_lora(tmp_path / "lora.safetensors", lora, {"unet": sd.unet, "text": sd.text_encoder}, layout="kohya")
    for each in (sd, plain):
        each.txt2img("a", steps=1)
        each.load_lora(tmp_path / "lora.safetensors")
        each.txt2img("a", steps=1)
        each.add_embedding("<it>", torch.ones(1, each.config.text.width))
        each.txt2img("a <it>", steps=1)
        each.save(tmp_path / f"{each is sd}.safetensors")
    assert (tmp_path / "True.safetensors").read_bytes() == (tmp_path / "False.safetensors").read_bytes()
    sd.unmerge()
    assert torch.equal(sd.unet.conv_in.weight, PLAIN.unet.conv_in.weight)


def test_only_the_largest_network_is_counted_among_what_has_to_fit():
    sd = offloaded()
    sizes = [sum(t.nbytes for t in network.parameters()) for network in sd.checkpoint.networks.values()]
    assert memory.weights_of(sd) == max(sizes)
    assert memory.weights_of(PLAIN) == sum(sizes)


def test_a_model_is_loaded_beside_the_device():
    sd = minisd.load("tests/data/tiny.safetensors", device="meta", offload=True)
    assert sd.unet.conv_in.weight.device.type == "cpu"
    assert sd.device.type == "meta"


def test_what_cannot_go_together_is_refused(capsys):
    sd = offloaded()
    sd.cuda_graph = True
    with pytest.raises(ValueError, match="a CUDA graph holds the addresses of weights"):
        next(txt2img(sd, "a", settings=Settings(steps=1)))
    assert main(["txt2img", "a", "--checkpoint", "tests/data/tiny.safetensors", "--offload"]) == 1
    assert "--offload needs a GPU: give --device cuda" in capsys.readouterr().err
