"""LoRA beside diffusers and peft: what minisd writes they load, what they write minisd loads, and both do the same."""

import pytest
import torch
from lively import lively, pixels
from test_lora import file_of, old_attention_name, random_lora, same_changes

import minisd
from minisd.adapters.lora import load_lora, save_lora
from minisd.checkpoints.files import save_safetensors
from minisd.checkpoints.lora_files import names_to_official
from minisd.checkpoints.save import save_checkpoint
from minisd.models.unet import Conditioning

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A function that gives a fresh pipeline of diffusers, and ours, of one small model of a kind."""
    folders = {}

    def both(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("model") / kind
            save_checkpoint(lively(kind).checkpoint, folders[kind], layout="diffusers")
        options = {"safety_checker": None, "requires_safety_checker": False, "local_files_only": True}
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folders[kind], **options)
        theirs.set_progress_bar_config(disable=True)
        return theirs, minisd.load(folders[kind])

    return both


@torch.no_grad()
def outputs(model):
    """The U-Net's and the text encoder's output for fixed inputs, of either side's model."""
    generator = torch.Generator().manual_seed(5)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 64, generator=generator)
    t, ids = torch.tensor([3, 800]), torch.randint(0, 49000, (2, 77), generator=generator)
    if isinstance(model, minisd.StableDiffusion):
        return model.unet(x, t, Conditioning(context)), model.text_encoder(ids)
    return model.unet(x, t, context).sample, model.text_encoder(ids).last_hidden_state


def assert_same_outputs(ours, theirs, *, base):
    for own, other, plain_output in zip(outputs(ours), outputs(theirs), base, strict=True):
        torch.testing.assert_close(own, other, atol=3e-5, rtol=0)  # merged here, beside the weights there: float32
        assert (other - plain_output).abs().max() > 0.3  # it did something


def run_layers(networks, kind):
    """The layers that diffusers has: it drops the last block of a text encoder that skips it, and the projection."""
    absent = ("text.projection", "text.blocks.2") if kind == "SD2_V" else ("text.projection",)
    return [layer for layer in names_to_official(networks) if not layer.startswith(absent)]


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("kind", ["SD1", "SD2_V"])
def test_what_is_written_is_loaded_by_diffusers_and_does_the_same(tmp_path, pipeline, kind, layout):
    theirs, ours = pipeline(kind)
    base = outputs(ours)
    layers = run_layers(ours.loras.networks, kind)
    lora = random_lora(layers, networks=ours.loras.networks)
    lora |= random_lora([x for x in layers if "conv" in x], rank=5, alpha=1.0, networks=ours.loras.networks)
    save_lora(tmp_path / "a.safetensors", lora, ours.loras.networks, layout=layout)
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    ours.load_lora(tmp_path / "a.safetensors")
    assert_same_outputs(ours, theirs, base=base)
    theirs.fuse_lora(lora_scale=0.5)
    ours.load_lora(tmp_path / "a.safetensors", 0.5)
    assert_same_outputs(ours, theirs, base=base)


def test_the_same_picture_comes_out_of_diffusers(tmp_path, pipeline):
    theirs, ours = pipeline("SD1")
    layers = [x for x in run_layers(ours.loras.networks, "SD1") if "attn" in x]
    lora = random_lora(layers, networks=ours.loras.networks)
    save_lora(tmp_path / "a.safetensors", lora, ours.loras.networks)
    size = {"height": 32, "width": 32, "guidance_scale": 5.0}
    before = pixels(ours.txt2img("a red apple", steps=6, seed=7, **size)[0])
    theirs.load_lora_weights(tmp_path, weight_name="a.safetensors")
    ours.load_lora(tmp_path / "a.safetensors")
    stable = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, **stable)
    generator = torch.Generator().manual_seed(7)
    picture = theirs("a red apple", num_inference_steps=6, generator=generator, **size).images[0]
    own = pixels(ours.txt2img("a red apple", steps=6, seed=7, **size)[0])
    assert abs(own - pixels(picture)).max() <= 1  # one of 255 levels: rounding
    assert abs(own - before).max() > 50


def their_lora(theirs):
    """Adapters of peft, drawn at random, in both networks of a pipeline; as their training leaves them."""
    torch.manual_seed(1)
    unet = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, rank_pattern={"conv1": 2}, alpha_pattern={"conv1": 5},
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj", "conv_shortcut"],
    )  # fmt: skip
    text = peft.LoraConfig(
        r=4, lora_alpha=2, init_lora_weights=False, use_rslora=True, target_modules=["q_proj", "v_proj", "fc1"]
    )
    theirs.unet.add_adapter(unet)
    peft.inject_adapter_in_model(text, theirs.text_encoder)
    theirs.text_encoder.peft_config = {"default": text}
    states = [peft.utils.get_peft_model_state_dict(network) for network in (theirs.unet, theirs.text_encoder)]
    return states, [unet.to_dict(), text.to_dict()]


@pytest.mark.parametrize("kind", ["SD1", "SD2_V"])
def test_what_diffusers_and_peft_write_is_read_and_does_the_same(tmp_path, pipeline, kind):
    theirs, ours = pipeline(kind)
    base = outputs(ours)
    (unet, text), (unet_config, text_config) = their_lora(theirs)
    type(theirs).save_lora_weights(
        tmp_path / "peft",
        unet,
        text,
        unet_lora_adapter_metadata=unet_config,
        text_encoder_lora_adapter_metadata=text_config,
    )
    ours.load_lora(tmp_path / "peft" / "pytorch_lora_weights.safetensors")
    assert_same_outputs(ours, theirs, base=base)

    # their conversion to kohya's layout, which for text encoders they do not read themselves; it leaves alpha = rank
    together = {f"unet.{name}": t for name, t in unet.items()} | {f"text_encoder.{name}": t for name, t in text.items()}
    kohya = diffusers.utils.convert_state_dict_to_kohya(diffusers.utils.convert_all_state_dict_to_peft(together))
    save_safetensors(tmp_path / "kohya", kohya)
    save_safetensors(tmp_path / "plain", together)
    read = [load_lora(tmp_path / name, ours.loras.networks) for name in ("kohya", "plain")]
    assert same_changes(*read)
    assert {layer.partition(".")[0] for layer in read[0]} == {"unet", "text"}


def test_what_peft_itself_writes_is_read_with_the_config_beside_it(tmp_path, pipeline):
    theirs, ours = pipeline("SD1")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "conv2"], init_lora_weights=False)
    peft.get_peft_model(theirs.unet, config).save_pretrained(tmp_path)
    base = outputs(ours)[:1]
    ours.load_lora(tmp_path / "adapter_model.safetensors")
    own, other = outputs(ours)[0], outputs(theirs)[0]
    torch.testing.assert_close(own, other, atol=3e-5, rtol=0)
    assert (own - base[0]).abs().max() > 0.3


def test_the_old_attention_processor_layout_is_read_as_diffusers_reads_it(tmp_path, pipeline):
    theirs, ours = pipeline("SD1")
    base = outputs(ours)
    layers = [x for x in run_layers(ours.loras.networks, "SD1") if ".attn1." in x or ".attn2." in x or ".attn.to_" in x]
    lora = random_lora(layers, rank=4, alpha=4.0, networks=ours.loras.networks)
    tensors = file_of(lora, old_attention_name, marks=(".down.weight", ".up.weight"))
    save_safetensors(tmp_path / "old.safetensors", tensors)
    theirs.load_lora_weights(tmp_path, weight_name="old.safetensors")
    ours.load_lora(tmp_path / "old.safetensors")
    assert_same_outputs(ours, theirs, base=base)
