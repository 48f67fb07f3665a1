"""Official tensor names ↔ ours, generated from the topology that builds the networks.

A key map says for each of our tensors where it stands in a file. Dialects: "ldm" (the original's single files) and
"diffusers" for U-Net, VAE and ControlNet; "hf" (Hugging Face) and "openclip" (packed in_proj) for the CLIP towers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisd.config import ControlNetConfig, UNetConfig, VAEConfig
from minisd.models.clip import CLIPText, CLIPVision
from minisd.models.controlnet import ControlNet
from minisd.models.unet import UNet
from minisd.models.vae import VAE


@dataclass(frozen=True)
class Source:
    """Where one of our tensors stands in a file: under `key`, whole or as one third of a packed projection.

    transposed: the file holds the transpose. linear: the file holds a matrix where we have a 1×1 convolution.
    """

    key: str
    third: int | None = None
    transposed: bool = False
    linear: bool = False

    def taken(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of our tensor, where the file's has this one: what `take` makes of it."""
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        if self.transposed:
            shape = shape[::-1]
        return (*shape, 1, 1) if self.linear else shape


KeyMap = dict[str, Source]


def take(tensors: Callable[[str], Tensor], keymap: KeyMap) -> dict[str, Tensor]:
    """Our state dict from a file's tensors: views only, nothing is copied."""
    state, packed = {}, {}
    for name, source in keymap.items():
        if source.third is None:
            tensor = tensors(source.key)
        else:  # read once for its three
            tensor = packed[source.key] if source.key in packed else packed.setdefault(source.key, tensors(source.key))
        if source.third is not None:
            tensor = tensor.chunk(3)[source.third]
        if source.transposed:
            tensor = tensor.T
        if source.linear:
            tensor = tensor[:, :, None, None]
        state[name] = tensor
    return state


def give(state: Mapping[str, Tensor], keymap: KeyMap) -> dict[str, Tensor]:
    """The file's tensors from our state dict: the inverse of `take`, bit for bit."""
    tensors, thirds = {}, {}
    for name, source in keymap.items():
        tensor = state[name]
        if source.linear:
            tensor = tensor[:, :, 0, 0]
        if source.transposed:
            tensor = tensor.T
        if source.third is None:
            tensors[source.key] = tensor
        else:
            thirds.setdefault(source.key, [None] * 3)[source.third] = tensor
    return tensors | {key: torch.cat(parts) for key, parts in thirds.items()}


def keymap(network: nn.Module, dialect: str) -> KeyMap:
    """Our tensor names of a network → where they stand in a file of that dialect (names without a file's prefix)."""
    config = network.control_config if isinstance(network, ControlNet) else network.config
    modules = dict(_MODULES[type(network), dialect](config))
    special = _SPECIAL.get((type(network), dialect), {})
    result = {}
    for name in network.state_dict():
        module, _, leaf = name.rpartition(".")
        if name in special:
            result[name] = special[name]
        elif dialect == "openclip" and module.endswith((".to_q", ".to_k", ".to_v")):
            block = modules[module.removesuffix(".attn" + module[-5:])]
            result[name] = Source(f"{block}.attn.in_proj_{leaf}", third="qkv".index(module[-1]))
        else:
            linear = dialect == "diffusers" and ".attn_1." in name and leaf == "weight" and not module.endswith("norm")
            result[name] = Source(f"{modules[module]}.{leaf}", linear=linear)
    return result


# Where a single tensor is not "module.weight" or "module.bias" on both sides.
_SPECIAL = {
    (CLIPText, "openclip"): {
        "position_embedding.weight": Source("positional_embedding"),
        "projection.weight": Source("text_projection", transposed=True),
    },
    (CLIPVision, "hf"): {"class_embedding": Source("vision_model.embeddings.class_embedding")},
    (CLIPVision, "openclip"): {
        "class_embedding": Source("class_embedding"),
        "position_embedding.weight": Source("positional_embedding"),
        "projection.weight": Source("proj", transposed=True),
    },
}

# ---------------------------------------------------------------------------------------------------------- U-Net


_RES = {
    "ldm": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "emb": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    "diffusers": {
        "norm1": "norm1",
        "conv1": "conv1",
        "emb": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
}
_TRANSFORMER_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
    "ff.proj_in": "ff.net.0.proj",
    "ff.proj_out": "ff.net.2",
    **{
        f"{attn}.{ours}": f"{attn}.{theirs}"
        for attn in ("attn1", "attn2")
        for ours, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0"))
    },
}


def _slot_places(config: UNetConfig, dialect: str) -> Iterator[tuple[str, str, str]]:
    """(our slot, part, the file's name of that part) for every part of every slot."""
    plan = config.plan()
    parts = lambda slot: [p for p in ("res", "attn", "resample") if getattr(slot, p)]  # noqa: E731
    if dialect == "ldm":
        for i, slot in enumerate(plan.down):
            for n, part in enumerate(parts(slot)):
                yield f"down.{i}", part, f"input_blocks.{i + 1}.{n}" + (".op" if part == "resample" else "")
        middle = [(f"mid.{i}", part) for i, slot in enumerate(plan.mid) for part in parts(slot)]
        for n, (slot, part) in enumerate(middle):
            yield slot, part, f"middle_block.{n}"
        for i, slot in enumerate(plan.up):
            for n, part in enumerate(parts(slot)):
                yield f"up.{i}", part, f"output_blocks.{i}.{n}" + (".conv" if part == "resample" else "")
        return
    names = {"res": "resnets", "attn": "attentions"}
    for side, slots, per_level in (
        ("down", plan.down, config.num_res_blocks + 1),
        ("up", plan.up, config.num_res_blocks + 1),
    ):
        for i, slot in enumerate(slots):
            level, n = divmod(i, per_level)
            for part in parts(slot):
                place = f"{side}samplers.0.conv" if part == "resample" else f"{names[part]}.{n}"
                yield f"{side}.{i}", part, f"{side}_blocks.{level}.{place}"
    for i, slot in enumerate(plan.mid):
        for part in parts(slot):
            yield f"mid.{i}", part, f"mid_block.{names[part]}.{i}"


def _unet_modules(config: UNetConfig, dialect: str) -> Iterator[tuple[str, str]]:
    official = {
        "ldm": ["time_embed.{}", "label_emb.0.{}", "label_emb", "input_blocks.0.0", "out.0", "out.2"],
        "diffusers": [
            "time_embedding.linear_{}",
            "class_embedding.linear_{}",
            "class_embedding",
            "conv_in",
            "conv_norm_out",
            "conv_out",
        ],
    }[dialect]
    time, vector, label, conv_in, norm_out, conv_out = official
    for ours, n in ((0, 0), (2, 2)) if dialect == "ldm" else ((0, 1), (2, 2)):
        yield f"time_embed.{ours}", time.format(n)
        yield f"label_emb.{ours}", vector.format(n)
    yield from (("label_emb", label), ("conv_in", conv_in), ("norm_out", norm_out), ("conv_out", conv_out))
    for slot, part, place in _slot_places(config, dialect):
        if part == "res":
            for ours, theirs in _RES[dialect].items():
                yield f"{slot}.res.{ours}", f"{place}.{theirs}"
        elif part == "resample":
            yield f"{slot}.resample.conv", place
        else:
            for name in ("norm", "proj_in", "proj_out"):
                yield f"{slot}.attn.{name}", f"{place}.{name}"
            for depth in range(config.transformer_depth):
                for ours, theirs in _TRANSFORMER_BLOCK.items():
                    yield f"{slot}.attn.blocks.{depth}.{ours}", f"{place}.transformer_blocks.{depth}.{theirs}"


def _controlnet_modules(config: ControlNetConfig, dialect: str) -> Iterator[tuple[str, str]]:
    yield from _unet_modules(config.unet, dialect)
    skips = len(config.unet.plan().skip_channels)
    for i in range(skips):
        yield f"zero_convs.{i}", f"zero_convs.{i}.0" if dialect == "ldm" else f"controlnet_down_blocks.{i}"
    yield "zero_conv_mid", "middle_block_out.0" if dialect == "ldm" else "controlnet_mid_block"
    hints = 2 * len(config.hint_widths)
    for i in range(hints):
        if dialect == "ldm":
            yield f"hint.convs.{i}", f"input_hint_block.{2 * i}"
        else:
            place = "conv_in" if i == 0 else "conv_out" if i == hints - 1 else f"blocks.{i - 1}"
            yield f"hint.convs.{i}", f"controlnet_cond_embedding.{place}"


# ------------------------------------------------------------------------------------------------------------ VAE


def _vae_modules(config: VAEConfig, dialect: str) -> Iterator[tuple[str, str]]:
    """Our names are the original's but for `skip`; diffusers counts the decoder's levels from the deepest."""
    ldm, last = dialect == "ldm", len(config.channel_mult) - 1
    res = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
        "skip": "nin_shortcut" if ldm else "conv_shortcut"
    }
    attn = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    yield from ((f"{x}quant_conv",) * 2 for x in ("", "post_"))
    for net, side, blocks in (
        ("encoder", "down", config.num_res_blocks),
        ("decoder", "up", config.num_res_blocks + 1),
    ):
        yield from ((f"{net}.{x}",) * 2 for x in ("conv_in", "conv_out"))
        yield f"{net}.norm_out", f"{net}.norm_out" if ldm else f"{net}.conv_norm_out"
        for level in range(last + 1):
            ours = f"{net}.{side}.{level}"
            theirs = ours if ldm else f"{net}.{side}_blocks.{level if side == 'down' else last - level}"
            for i in range(blocks):
                for name, official in res.items():
                    yield f"{ours}.block.{i}.{name}", f"{theirs}.{'block' if ldm else 'resnets'}.{i}.{official}"
            resample = f"{side}sample.conv"
            yield f"{ours}.{resample}", f"{theirs}.{resample if ldm else f'{side}samplers.0.conv'}"
        for i in (1, 2):
            for name, official in res.items():
                place = f"mid.block_{i}" if ldm else f"mid_block.resnets.{i - 1}"
                yield f"{net}.mid.block_{i}.{name}", f"{net}.{place}.{official}"
        for name, official in attn.items():
            place = f"mid.attn_1.{name}" if ldm else f"mid_block.attentions.0.{official}"
            yield f"{net}.mid.attn_1.{name}", f"{net}.{place}"


# ----------------------------------------------------------------------------------------------------------- CLIP


def _blocks(layers: int, ours_to_theirs: Mapping[str, str], place: str) -> Iterator[tuple[str, str]]:
    for i in range(layers):
        yield f"blocks.{i}", f"{place}.{i}"
        for ours, theirs in ours_to_theirs.items():
            yield f"blocks.{i}.{ours}", f"{place}.{i}.{theirs}"


_HF_BLOCK = {
    "norm1": "layer_norm1",
    "attn.to_q": "self_attn.q_proj",
    "attn.to_k": "self_attn.k_proj",
    "attn.to_v": "self_attn.v_proj",
    "attn.to_out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_OPENCLIP_BLOCK = {
    "norm1": "ln_1",
    "attn.to_out": "attn.out_proj",
    "norm2": "ln_2",
    "fc1": "mlp.c_fc",
    "fc2": "mlp.c_proj",
}


def _text_modules_hf(config) -> Iterator[tuple[str, str]]:
    yield "token_embedding", "text_model.embeddings.token_embedding"
    yield "position_embedding", "text_model.embeddings.position_embedding"
    yield "final_norm", "text_model.final_layer_norm"
    yield "projection", "text_projection"
    yield from _blocks(config.layers, _HF_BLOCK, "text_model.encoder.layers")


def _text_modules_openclip(config) -> Iterator[tuple[str, str]]:
    yield from (("token_embedding", "token_embedding"), ("final_norm", "ln_final"))
    yield from _blocks(config.layers, _OPENCLIP_BLOCK, "transformer.resblocks")


def _vision_modules_hf(config) -> Iterator[tuple[str, str]]:
    yield "patch_embedding", "vision_model.embeddings.patch_embedding"
    yield "position_embedding", "vision_model.embeddings.position_embedding"
    yield "pre_norm", "vision_model.pre_layrnorm"  # the typo is Hugging Face's
    yield "post_norm", "vision_model.post_layernorm"
    yield "projection", "visual_projection"
    yield from _blocks(config.layers, _HF_BLOCK, "vision_model.encoder.layers")


def _vision_modules_openclip(config) -> Iterator[tuple[str, str]]:
    yield from (("patch_embedding", "conv1"), ("pre_norm", "ln_pre"), ("post_norm", "ln_post"))
    yield from _blocks(config.layers, _OPENCLIP_BLOCK, "transformer.resblocks")


_MODULES: dict[tuple[type, str], Callable] = {
    (CLIPText, "hf"): _text_modules_hf,
    (CLIPText, "openclip"): _text_modules_openclip,
    (CLIPVision, "hf"): _vision_modules_hf,
    (CLIPVision, "openclip"): _vision_modules_openclip,
    **{
        (network, dialect): lambda config, modules=modules, dialect=dialect: modules(config, dialect)
        for network, modules in ((UNet, _unet_modules), (VAE, _vae_modules), (ControlNet, _controlnet_modules))
        for dialect in ("ldm", "diffusers")
    },
}
