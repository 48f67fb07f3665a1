"""The U-Net of Stable Diffusion, and the conditioning that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import SlotPlan, UNetConfig
from minisd.nn.attention import Attention
from minisd.nn.blocks import Downsample, ResBlock, Upsample, timestep_embedding
from minisd.nn.transformer import KeysValues, SpatialTransformer


class UNet(nn.Module):
    """ε, v or x̂₀ from a noisy latent, a timestep and a conditioning (Rombach et al. 2022, section 3.3).

    Every slot of `down` pushes a skip, every slot of `up` pops one; the topology is `config.plan()`.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        plan = config.plan()
        self.time_embed = embedding_mlp(config.channels, config.embedding_dim)
        self.label_emb = label_embedding(config)
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList(Slot(slot, config) for slot in plan.down)
        self.mid = nn.ModuleList(Slot(slot, config) for slot in plan.mid)
        self.up = nn.ModuleList(Slot(slot, config) for slot in plan.up)
        self.norm_out = nn.GroupNorm(config.norm_groups, config.channels, config.norm_eps)
        self.conv_out = nn.Conv2d(config.channels, config.out_channels, 3, padding=1)
        zero_residual_branches(self)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """x_t 'b c h w' of any side lengths; t: timestep in [0, T-1], a number or a tensor 'b' → 'b out_channels h w'.

        cond.concat is joined to x_t along channels; cond.context must have the batch of x_t.
        """
        x = x_t if cond.concat is None else torch.cat([x_t, cond.concat], dim=1)
        check_inputs(self.config, x, cond)
        emb = embed_time(self, t, cond, x)
        contexts = iter(cond.kv) if cond.kv is not None else repeat(cond.context)

        x = self.conv_in(x)
        skips = [x]
        for slot in self.down:
            x = slot(x, emb, next(contexts))
            skips.append(x)
        for slot in self.mid:
            x = slot(x, emb, next(contexts))

        if cond.residuals is not None:
            *to_skips, to_mid = cond.residuals
            skips = [skip + residual for skip, residual in zip(skips, to_skips, strict=True)]
            x = x + to_mid

        for slot in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            # half of an odd side is rounded up on the way down, so upsampling takes the size of the next skip
            x = slot(x, emb, next(contexts), size=skips[-1].shape[-2:] if skips else None)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))

    def slots(self) -> Iterator[Slot]:
        """All slots in the order in which forward runs them."""
        yield from (*self.down, *self.mid, *self.up)

    def attentions(self) -> dict[str, Attention]:
        """Every attention layer by its dotted name, for experiments that wrap or swap them."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Attention)}

    def with_keys_values(self, cond: Conditioning) -> Conditioning:
        """cond with the keys and values of its context computed: they are the same at every sampling step.

        Exact. They belong to the present weights: make them again after a weight (a LoRA, say) has changed.
        """
        kv = tuple(slot.attn.keys_values(cond.context) if slot.attn else None for slot in self.slots())
        return replace(cond, kv=kv)


class Slot(nn.Module):
    """A residual block, a transformer, a resampling: any of them may be absent (None)."""

    def __init__(self, plan: SlotPlan, config: UNetConfig):
        super().__init__()
        channels = plan.out_channels
        self.res = self.attn = self.resample = None
        if plan.res:
            self.res = ResBlock(
                plan.in_channels,
                channels,
                config.embedding_dim,
                norm_groups=config.norm_groups,
                norm_eps=config.norm_eps,
            )
        if plan.attn:
            self.attn = SpatialTransformer(
                channels,
                heads=plan.heads,
                context_dim=config.context_dim,
                depth=config.transformer_depth,
                self_attention=plan.self_attention,
                linear_projection=config.linear_projection,
                norm_groups=config.norm_groups,
                norm_eps=config.attn_norm_eps,
                layer_norm_eps=config.layer_norm_eps,
            )
        if plan.resample:
            self.resample = Downsample(channels) if plan.resample == "down" else Upsample(channels)

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor | list[KeysValues] | None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """size: the side lengths that an upsampling reaches, twice x's when None."""
        if self.res is not None:
            x = self.res(x, emb)
        if self.attn is not None:
            x = self.attn(x, context)
        if self.resample is not None:
            x = self.resample(x) if isinstance(self.resample, Downsample) else self.resample(x, size)
        return x


@dataclass(frozen=True)
class Conditioning:
    """All that a U-Net is told besides x_t and t.

    context: 'b l d', for the cross-attention. y: raw class or noise level 'b' (integer), or vector 'b e', which the
    U-Net's own label_emb maps and adds to the timestep embedding. concat: 'b c h w', joined to x_t (inpainting, depth).
    residuals: one tensor per skip plus one for the middle, added to them (ControlNet). kv: the keys and values of the
    context, one entry per slot, computed once by `unet.with_keys_values`.
    """

    context: Tensor
    y: Tensor | None = None
    concat: Tensor | None = None
    residuals: tuple[Tensor, ...] | None = None
    kv: tuple[list[KeysValues] | None, ...] | None = None

    @classmethod
    def cat(cls, conds: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch. ValueError when one has a part that another lacks, or contexts of unequal length."""
        for field in fields(cls):
            if len({getattr(cond, field.name) is None for cond in conds}) > 1:
                raise ValueError(f"cannot join conditionings of which only some have {field.name!r}: give it to all")
        lengths = {cond.context.shape[1] for cond in conds}
        if len(lengths) > 1:
            raise ValueError(
                f"cannot join contexts of {sorted(lengths)} tokens: repeat them to one length, text.prompts.same_length"
            )
        return cls(*(_map(lambda *parts: torch.cat(parts), *(getattr(c, f.name) for c in conds)) for f in fields(cls)))

    def repeat(self, n: int) -> Conditioning:
        """Every image n times in a row: 'b …' → '(b n) …'."""
        return self.map(lambda x: x.repeat_interleave(n, 0))

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """function of every tensor."""
        return type(self)(*(_map(function, getattr(self, f.name)) for f in fields(self)))


def _map(function: Callable[..., Tensor], first: Any, *rest: Any) -> Any:
    """Apply function to the tensors at corresponding places of equal nests of tuples, lists and None."""
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(first, *rest)
    return type(first)(_map(function, *parts) for parts in zip(first, *rest, strict=True))


def embed_time(network: Any, t: Tensor | float, cond: Conditioning, x: Tensor) -> Tensor:
    """The embedding 'b e' of t, and of cond.y where the network has a label_emb, in x's dtype."""
    t = torch.as_tensor(t, device=x.device).expand(x.shape[0])
    emb = network.time_embed(timestep_embedding(t, network.config.channels).to(x.dtype))
    if cond.y is None:
        return emb
    y = cond.y if network.config.num_classes is not None else cond.y.to(x.dtype)
    return emb + network.label_emb(y)


def label_embedding(config: UNetConfig) -> nn.Module | None:
    """What maps cond.y to the width of the timestep embedding; None for a network without y."""
    if config.num_classes is not None:
        return nn.Embedding(config.num_classes, config.embedding_dim)
    if config.vector_dim is not None:
        return embedding_mlp(config.vector_dim, config.embedding_dim)
    return None


def embedding_mlp(in_features: int, out_features: int) -> nn.Sequential:
    """The two linear layers that bring timesteps, and vectors y, to the width of the embedding."""
    return nn.Sequential(nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features))


def check_inputs(config: UNetConfig, x: Tensor, cond: Conditioning) -> None:
    """ValueError that says what is wrong, where a shape error deep inside would come otherwise."""
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(
            f"this U-Net takes {config.in_channels} input channels 'b c h w', got {tuple(x.shape)}"
            + (": the rest goes into Conditioning(concat=…)" if cond.concat is None and x.shape[1:2] == (4,) else "")
        )
    if cond.context.ndim != 3 or cond.context.shape[-1] != config.context_dim:
        raise ValueError(
            f"this U-Net takes a context 'b l {config.context_dim}', got {tuple(cond.context.shape)}: "
            "was it made by another model's text encoder?"
        )
    if cond.context.shape[0] != x.shape[0]:
        raise ValueError(f"x_t holds {x.shape[0]} images, the context {cond.context.shape[0]}: use Conditioning.repeat")
    wants_y = config.num_classes is not None or config.vector_dim is not None
    if wants_y != (cond.y is not None):
        if not wants_y:
            raise ValueError("this U-Net takes no y (it has no label_emb), but one was given")
        wanted = "an integer label" if config.num_classes is not None else f"a vector of width {config.vector_dim}"
        raise ValueError(f"this U-Net needs y, {wanted} per image: Conditioning(context, y=…)")


def zero_residual_branches(network: nn.Module) -> None:
    """Start every residual branch at zero (Dhariwal & Nichol 2021): each block begins as its skip."""
    for module in network.modules():
        last = getattr(module, {ResBlock: "conv2", SpatialTransformer: "proj_out"}.get(type(module), ""), None)
        if last is not None:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
