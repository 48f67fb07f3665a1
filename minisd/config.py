"""What a model is made of: frozen dataclasses, and presets that state only their difference from SD1.

Torch-free, so that the command line and its help never wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

PredictionType = Literal["eps", "v", "x_0"]
Task = Literal["text-to-image", "inpainting", "depth-to-image", "pix2pix", "upscaling", "image-variation"]


@dataclass(frozen=True)
class SlotPlan:
    """One slot of the U-Net: a residual block, a transformer, a resampling, any of which may be absent.

    in_channels counts the concatenated skip of an up slot. heads: of the transformer; self_attention=False makes its
    first attention a second cross-attention (the x4 upscaler).
    """

    in_channels: int
    out_channels: int
    res: bool = True
    attn: bool = False
    heads: int = 0
    self_attention: bool = True
    resample: Literal["down", "up"] | None = None


@dataclass(frozen=True)
class UNetPlan:
    """The topology of a U-Net, from which the network and its key maps are both built."""

    down: tuple[SlotPlan, ...]
    mid: tuple[SlotPlan, ...]
    up: tuple[SlotPlan, ...]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of the skips in the order they are pushed: conv_in's, then one per down slot."""
        return (self.down[0].in_channels, *(slot.out_channels for slot in self.down))


@dataclass(frozen=True)
class UNetConfig:
    """The cross-attention U-Net of Rombach et al. 2022. The defaults are Stable Diffusion 1.x.

    attention_levels: the levels (0 is full size) that carry transformers. Exactly one of num_heads (SD1: the same
    number everywhere) and head_width (SD2: the same width everywhere) is given. cross_only_levels: levels whose
    self-attention is replaced by a second cross-attention. num_classes: `y` is an integer label (the noise level);
    vector_dim: `y` is a vector of that width (unCLIP).
    """

    in_channels: int = 4
    out_channels: int = 4
    channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    cross_only_levels: tuple[int, ...] = ()
    num_heads: int | None = 8
    head_width: int | None = None
    transformer_depth: int = 1
    context_dim: int = 768
    linear_projection: bool = False
    num_classes: int | None = None
    vector_dim: int | None = None
    norm_groups: int = 32
    norm_eps: float = 1e-5
    attn_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if (self.num_heads is None) == (self.head_width is None):
            raise ValueError(
                f"a U-Net has its heads by number or by width, not both: num_heads={self.num_heads}, "
                f"head_width={self.head_width}; set one of them to None"
            )
        if not self.channel_mult or self.channel_mult[0] != 1:
            raise ValueError(
                f"channel_mult is {self.channel_mult}: it starts with 1, at the width of conv_in and conv_out"
            )
        if self.num_classes is not None and self.vector_dim is not None:
            raise ValueError("y is a class (num_classes) or a vector (vector_dim), not both")
        for level, mult in enumerate(self.channel_mult):
            width = self.channels * mult
            if width % self.norm_groups:
                raise ValueError(
                    f"level {level} has {width} channels, which {self.norm_groups} norm groups do not divide"
                )
            attends = level in self.attention_levels or level == len(self.channel_mult) - 1  # the middle always does
            if attends and width % (self.num_heads or self.head_width or 0):
                raise ValueError(
                    f"level {level} has {width} channels, which num_heads={self.num_heads} / "
                    f"head_width={self.head_width} does not divide"
                )

    @property
    def embedding_dim(self) -> int:
        return 4 * self.channels

    @property
    def factor(self) -> int:
        """How many times the deepest level is smaller than the latents."""
        return 2 ** (len(self.channel_mult) - 1)

    def plan(self) -> UNetPlan:
        """The topology, written once: one skip per down slot and one for conv_in, popped by the up slots in reverse."""
        last = len(self.channel_mult) - 1

        def with_attention(slot: SlotPlan, level: int | None) -> SlotPlan:
            heads = self.num_heads or slot.out_channels // (self.head_width or 0)
            return replace(slot, attn=True, heads=heads, self_attention=level not in self.cross_only_levels)

        def block(level: int, in_channels: int) -> SlotPlan:
            slot = SlotPlan(in_channels, self.channels * self.channel_mult[level])
            return with_attention(slot, level) if level in self.attention_levels else slot

        down, width = [], self.channels
        for level in range(last + 1):
            for _ in range(self.num_res_blocks):
                down.append(block(level, width))
                width = down[-1].out_channels
            if level < last:
                down.append(SlotPlan(width, width, res=False, resample="down"))

        mid = (with_attention(SlotPlan(width, width), None), SlotPlan(width, width))

        skips = [self.channels, *(slot.out_channels for slot in down)]
        up = []
        for level in reversed(range(last + 1)):
            for i in range(self.num_res_blocks + 1):
                slot = block(level, width + skips.pop())
                if level > 0 and i == self.num_res_blocks:
                    slot = replace(slot, resample="up")
                up.append(slot)
                width = slot.out_channels
        return UNetPlan(tuple(down), mid, tuple(up))


@dataclass(frozen=True)
class VAEConfig:
    """The KL autoencoder of Rombach et al. 2022: images 'b 3 H W' in [-1, 1] ↔ latents 'b 4 H/8 W/8'.

    scale_factor multiplies latents before the U-Net and divides them before the decoder: it is 1/std of a first
    training batch's latents, so that the diffusion process meets unit variance.
    """

    image_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    scale_factor: float = 0.18215
    norm_groups: int = 32
    norm_eps: float = 1e-6
    logvar_range: tuple[float, float] = (-30.0, 20.0)

    @property
    def factor(self) -> int:
        """Image pixels per latent, along each side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class CLIPTextConfig:
    """A CLIP text tower (Radford et al. 2021). The defaults are ViT-L/14's, which Stable Diffusion 1.x uses.

    skip: how many of the last blocks the context leaves out (SD2: 1, "penultimate"); the final norm is always applied.
    pad_id: what the tokenizer fills a prompt up with (SD1 repeats EOS, SD2 uses 0), dialect: whose tokenizer it is.
    projection_dim: width of the shared image-text space, None where the file has no projection.
    unknown_id: an id whose row of the token embedding is also that of every id the model was never taught.
    """

    vocab_size: int = 49408
    length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    skip: int = 0
    projection_dim: int | None = None
    bos_id: int = 49406
    eos_id: int = 49407
    pad_id: int = 49407
    dialect: Literal["openai", "open_clip"] = "openai"
    unknown_id: int | None = None
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class CLIPVisionConfig:
    """A CLIP vision transformer with its projection. The defaults are ViT-L/14's."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection_dim: int | None = 768
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class ScheduleConfig:
    """The training noise schedule. "scaled_linear" (linear in √β) is what CompVis calls "linear".

    final_alpha_cumprod: ᾱ after the last step of ddim and plms; None is ᾱ[0], Stable Diffusion's convention.
    """

    kind: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    num_timesteps: int = 1000
    start: float = 0.00085
    end: float = 0.012
    zero_terminal_snr: bool = False
    final_alpha_cumprod: float | None = None


@dataclass(frozen=True)
class ControlNetConfig:
    """A ControlNet (Zhang et al. 2023): the encoder of `unet`, and the convolutions that read the hint."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)


@dataclass(frozen=True)
class ModelConfig:
    """A whole latent diffusion model.

    task: what the U-Net is given besides x_t, t and a prompt, see `TASK_INPUTS`. prediction: what its output means.
    image_size: the side of the images it was trained on.
    """

    name: str = "Stable Diffusion 1.x"
    task: Task = "text-to-image"
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    prediction: PredictionType = "eps"
    image_size: int = 512


TASK_INPUTS: dict[Task, str] = {
    "text-to-image": "nothing more",
    "inpainting": "concat: the mask and the latents of the masked image",
    "depth-to-image": "concat: a depth map in [-1, 1] at the size of the latents",
    "pix2pix": "concat: the latents of the image to edit, not scaled",
    "upscaling": "concat: the noised low-resolution RGB image; y: its noise level",
    "image-variation": "y: a CLIP image embedding and the embedding of its noise level",
}


_OPENCLIP_H_TEXT = CLIPTextConfig(
    width=1024,
    layers=24,
    heads=16,
    mlp_width=4096,
    activation="gelu",
    skip=1,
    projection_dim=1024,
    pad_id=0,
    dialect="open_clip",
)
_OPENCLIP_H_VISION = CLIPVisionConfig(
    width=1280, layers=32, heads=16, mlp_width=5120, activation="gelu", projection_dim=1024
)

SD1 = ModelConfig()
SD1_INPAINT = replace(
    SD1, name="Stable Diffusion 1.5 inpainting", task="inpainting", unet=replace(SD1.unet, in_channels=9)
)
SD1_PIX2PIX = replace(SD1, name="InstructPix2Pix", task="pix2pix", unet=replace(SD1.unet, in_channels=8))
SD2_BASE = ModelConfig(
    name="Stable Diffusion 2.x base",
    unet=UNetConfig(num_heads=None, head_width=64, context_dim=1024, linear_projection=True),
    text=_OPENCLIP_H_TEXT,
)
SD2_V = replace(SD2_BASE, name="Stable Diffusion 2.x 768-v", prediction="v", image_size=768)
SD2_INPAINT = replace(
    SD2_BASE, name="Stable Diffusion 2 inpainting", task="inpainting", unet=replace(SD2_BASE.unet, in_channels=9)
)
SD2_DEPTH = replace(
    SD2_BASE, name="Stable Diffusion 2 depth", task="depth-to-image", unet=replace(SD2_BASE.unet, in_channels=5)
)
SD2_UNCLIP_H = replace(
    SD2_V,
    name="Stable Diffusion 2.1 unCLIP (H)",
    task="image-variation",
    unet=replace(SD2_V.unet, vector_dim=2048),
    vision=_OPENCLIP_H_VISION,
)
SD2_UNCLIP_L = replace(
    SD2_V,
    name="Stable Diffusion 2.1 unCLIP (L)",
    task="image-variation",
    unet=replace(SD2_V.unet, vector_dim=1536),
    vision=CLIPVisionConfig(),
)
SD_X4_UPSCALER = replace(
    SD2_V,
    name="Stable Diffusion x4 upscaler",
    task="upscaling",
    unet=replace(
        SD2_V.unet,
        in_channels=7,
        channels=256,
        channel_mult=(1, 2, 2, 4),
        attention_levels=(1, 2, 3),
        cross_only_levels=(1, 2),
        num_heads=8,
        head_width=None,
        num_classes=1000,
    ),
    vae=VAEConfig(channel_mult=(1, 2, 4), scale_factor=0.08333),
    schedule=ScheduleConfig(start=0.0001, end=0.02),
    image_size=512,
)

MINI = ModelConfig(  # Stable Diffusion's geometry, small enough to be trained on a laptop and to be shipped
    name="minisd mini",
    unet=UNetConfig(
        channels=64,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        attention_levels=(1, 2),
        num_heads=None,
        head_width=32,
        context_dim=128,
        norm_groups=16,
    ),
    vae=VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, norm_groups=2, scale_factor=1.0),
    text=CLIPTextConfig(width=128, layers=4, heads=4, mlp_width=512, projection_dim=128),
    vision=CLIPVisionConfig(
        image_size=64, patch_size=8, width=192, layers=6, heads=6, mlp_width=768, projection_dim=128
    ),
    prediction="v",
    image_size=128,
)

PRESETS = {  # the official models, by which checkpoints are recognised; that of a mini model says itself what it is
    "SD1": SD1,
    "SD1_INPAINT": SD1_INPAINT,
    "SD1_PIX2PIX": SD1_PIX2PIX,
    "SD2_BASE": SD2_BASE,
    "SD2_V": SD2_V,
    "SD2_INPAINT": SD2_INPAINT,
    "SD2_DEPTH": SD2_DEPTH,
    "SD2_UNCLIP_H": SD2_UNCLIP_H,
    "SD2_UNCLIP_L": SD2_UNCLIP_L,
    "SD_X4_UPSCALER": SD_X4_UPSCALER,
}
