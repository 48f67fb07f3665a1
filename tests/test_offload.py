"""Networks that run one at a time on a device. The CPU stands in for a GPU: copies are told by where they lie."""

import copy

import numpy as np
import pytest
import torch
from lively import lively
from PIL import Image

import minisd
from minisd.adapters.lora import Lora, LowRank, save_lora
from minisd.cli import main
from minisd.cli.options import Model
from minisd.runtime import memory
from minisd.runtime.offload import Offload
from minisd.runtime.optimize import channels_last
from minisd.tasks import txt2img
from minisd.training.subject.recipe import with_networks

PLAIN = lively("SD1")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
MASK = Image.fromarray(np.tile(np.uint8([0, 255]), (32, 16)))
TASKS = {
    "txt2img": lambda sd: sd.txt2img("a red apple", steps=2, num_images=2),
    "two passes": lambda sd: sd.txt2img("a red apple", steps=2, height=96, width=96, hires_fix=0.5),
    "img2img": lambda sd: sd.img2img("a red apple", PICTURE, steps=2),
    "inpaint": lambda sd: sd.inpaint("a red apple", PICTURE, MASK, steps=2),
    "outpaint": lambda sd: sd.outpaint("a red apple", PICTURE, right=16, steps=2),
    "tiles": lambda sd: sd.txt2img("a red apple", steps=2, vae_tiling=64, height=96, width=96),
}


def offloaded(device="cpu"):
    sd = copy.deepcopy(PLAIN)
    sd.offload = Offload(device, sd.networks.values())
    return sd


def places(sd):
    return {name: {t.data_ptr() for t in network.parameters()} for name, network in sd.checkpoint.networks.items()}


@pytest.mark.parametrize("name", TASKS)
def test_a_layer_runs_while_its_network_alone_is_on_the_device_and_pictures_are_the_same(name):
    sd = offloaded()
    channels_last(sd.unet)
    home, ran = places(sd), set()

    def watch(network):
        def check(*_):
            ran.add(network)
            assert [other for other, now in places(sd).items() if not now & home[other]] == [network]

        return check

    for network in home:
        for layer in sd.checkpoint.networks[network].modules():
            if [*layer.parameters(recurse=False)]:
                layer.register_forward_pre_hook(watch(network))
    for ours, plain in zip(TASKS[name](sd), TASKS[name](PLAIN), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(plain))
    assert ran == {"text", "unet", "vae"}
    sd.unload()
    assert places(sd) == home


def test_where_a_copy_fails_none_is_left_and_the_next_call_works(monkeypatch):
    sd = offloaded()
    home, copy_to, copies = places(sd), torch.Tensor.to, []

    def full(tensor, *args, **kwargs):
        copies.append(tensor)
        if len(copies) == 5:
            raise RuntimeError("out of memory")
        return copy_to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        sd.offload.load(sd.unet)
    assert places(sd) == home
    sd.offload.load(sd.unet)
    assert not places(sd)["unet"] & home["unet"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_networks_really_go_to_the_device():
    sd = offloaded("cuda")
    sd.offload.load(sd.unet)
    assert {t.device.type for t in sd.unet.parameters()} == {"cuda"}
    sd.offload.load(sd.vae)
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


def test_each_networks_weights_are_counted_where_it_works():
    sampling = next(txt2img(PLAIN, "a", steps=1))
    ours, plain = (memory.needs(sampling, offload=offload) for offload in (True, False))
    weights = {name: memory.weights_of(network) for name, network in PLAIN.checkpoint.networks.items()}
    assert (ours.weights, plain.weights) == (0, sum(weights.values()))
    assert (ours.step, ours.decode) == (plain.step + weights["unet"], plain.decode + weights["vae"])
    assert "about 0.0 GB of memory: with the weights of the network at work a step" in str(ours)


def test_a_model_is_loaded_beside_the_device():
    sd = minisd.load("tests/data/tiny.safetensors", device="meta", offload=True)
    assert sd.unet.conv_in.weight.device.type == "cpu"
    assert sd.device.type == "meta"


def test_what_cannot_go_together_is_refused(capsys, tmp_path):
    with pytest.raises(ValueError, match="a CUDA graph holds the addresses of weights"):
        Model(offload=True, cuda_graph=True).check()
    with pytest.raises(ValueError, match="until they run on another device: give it, such as cuda"):
        minisd.load("tests/data/tiny.safetensors", offload=True)
    assert main(["txt2img", "a", "--checkpoint", "tests/data/tiny.safetensors", "--offload"]) == 1
    assert "until they run on another device" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["eval", "subjects", "--data", "weights/subjects"], ["eval", "mini"]])
def test_evaluations_refuse_it(command, capsys, tmp_path):
    (tmp_path / "images.npy").touch()
    data = [] if "subjects" in command else ["--data", tmp_path]
    assert main([*command, *map(str, data), "--out", str(tmp_path / "out"), "--offload", "--device", "meta"]) == 1
    assert "--offload is for drawing alone" in capsys.readouterr().err


def test_a_training_refuses_it():
    with pytest.raises(ValueError, match="loaded with offload only draws"):
        with_networks(offloaded())
