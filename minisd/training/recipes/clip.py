"""Recipe: CLIP (Radford et al. 2021), a text and a vision tower that learn to find each other's pairs."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.config import CLIPTextConfig, CLIPVisionConfig
from minisd.family.clip_vision import CLIPVision, normalize
from minisd.models.clip import CLIPText
from minisd.text.tokenizer import Tokenizer
from minisd.training.data import Augmentation, Pictures, augmented
from minisd.training.draws import Draws
from minisd.training.loop import train
from minisd.training.loss import contrastive_loss
from minisd.training.options import RUN, LoopConfig, TrainingRun
from minisd.training.parallel import ALONE, Processes
from minisd.training.recipes.vocabulary import Rows
from minisd.training.weights import seeded

MAX_SCALE = 100.0  # of the logits, as in the paper: the temperature stays above 0.01


@dataclass(frozen=True)
class CLIPRecipeConfig:
    """The two towers and how they learn.

    Attributes:
        text: the text tower; both towers need the same projection_dim.
        vision: the vision tower; pictures are resized to its image_size.
        loop: the training loop; gradient_accumulation stays 1, since a batch's pairs compete with each other.
        unknown: share of tokens shown as `unknown`, which teaches the row of all words that no caption has.
        keep: words to keep rows for though no caption has them.
        augmentation: how pictures are varied.
    """

    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    unknown: float = 0.02
    keep: tuple[str, ...] = ("sks", "ohwx", "zwx")
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self):
        if self.loop.gradient_accumulation != 1:
            raise ValueError("a contrastive batch cannot be cut into micro-batches: set gradient_accumulation to 1")
        if self.text.projection_dim is None or self.text.projection_dim != self.vision.projection_dim:
            raise ValueError(
                f"the towers meet in one space: projection_dim is {self.text.projection_dim} for text, "
                f"{self.vision.projection_dim} for vision"
            )


@dataclass(frozen=True, eq=False)
class CLIP:
    """Two towers and the scale 1/temperature of their similarities. text has the full table of CLIP's ids."""

    text: CLIPText
    vision: CLIPVision
    scale: float


class Temperature(nn.Module):
    """The learnt scale of the logits, by its logarithm, from 1/0.07; held at MAX_SCALE, as in the original."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self) -> Tensor:
        with torch.no_grad():  # the weight itself: beyond a clamped value there would be no gradient to come back by
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        return self.log_scale.exp()


class CLIPRecipe:
    """A picture and one of its captions, drawn anew each time, against all others of the batch, on all processes."""

    name = "clip"

    def __init__(self, pictures: Pictures, config: CLIPRecipeConfig):
        pictures.check_captions()
        self.pictures, self.config = pictures, config
        tokenizer = Tokenizer(length=config.text.length, pad_id=config.text.pad_id, dialect=config.text.dialect)
        texts = [text for texts in pictures.captions for text in texts]
        self.rows = Rows.used_by(texts, tokenizer, config.text, config.keep)
        ids = tokenizer(texts)
        # no further than the longest caption's end token: the tower is causal, and reads a caption there
        longest = int((ids == config.text.eos_id).int().argmax(-1).max()) + 1
        self.ids = self.rows.row_of_id[ids[:, :longest]]  # of every caption, 'k l'
        self.count = torch.tensor([len(texts) for texts in pictures.captions])  # captions of each picture
        self.first = self.count.cumsum(0) - self.count  # the first of them
        compact = self.rows.compact(config.text)
        with seeded("clip", config.loop.seed):
            self.text, self.vision, temperature = CLIPText(compact), CLIPVision(config.vision), Temperature()
        self.networks = nn.ModuleDict({"text": self.text, "vision": self.vision, "temperature": temperature})
        self.group = ALONE

    def __len__(self) -> int:
        return len(self.pictures.visited)

    def loss(self, examples: Tensor, draws: Draws) -> dict[str, Tensor]:
        rows = self.pictures.visited[examples]
        way = (draws.uniform().cpu() * self.count[rows]).long()
        ids = self.ids[self.first[rows] + way].to(draws.device)
        image = augmented(self.pictures, rows, draws, self.config.augmentation)
        text = self.group.gather(self.text.embed(self._veiled(ids, draws)))
        vision = self.group.gather(self.vision(self.resized(image)))
        scale = self.networks["temperature"]()
        loss, accuracy = contrastive_loss(text, vision, scale)
        return {"loss": loss, "accuracy": accuracy, "scale": scale}

    def _veiled(self, ids: Tensor, draws: Draws) -> Tensor:
        """Some tokens as `unknown`; never BOS, EOS or padding."""
        config = self.text.config
        plain = (ids != config.bos_id) & (ids != config.eos_id) & (ids != config.pad_id)
        # uniform numbers from normal ones: one draw for every token
        share = torch.special.ndtr(draws.normal(ids.shape[1]))
        return torch.where(plain & (share < self.config.unknown), self.rows.unknown, ids)

    def resized(self, image: Tensor) -> Tensor:
        """The vision tower's input from pictures 'b 3 h w' in [-1, 1] of any size."""
        side = self.config.vision.image_size
        return normalize(F.interpolate(image, size=(side, side), mode="bilinear", antialias=True))

    def sheet(self, step: int) -> None:
        """Nothing to look at: the curves say it."""


def train_clip(
    pictures: Pictures,
    folder: str | os.PathLike,
    config: CLIPRecipeConfig,
    run: TrainingRun = RUN,
    group: Processes = ALONE,
) -> CLIP:
    """The trained towers, averaged, on the run's device."""
    recipe = CLIPRecipe(pictures, config)
    recipe.group = group
    settings = {"recipe": asdict(config), "data": pictures.digest}
    train(recipe, config.loop, Path(folder), run, group, settings)
    for network in recipe.networks.values():
        network.requires_grad_(False)
    return CLIP(
        full_text(recipe.text, recipe.rows, config.text), recipe.vision, recipe.networks["temperature"]().item()
    )


def full_text(text: CLIPText, rows: Rows, config: CLIPTextConfig) -> CLIPText:
    """The text tower with a row for every id of CLIP."""
    state = text.state_dict() | {"token_embedding.weight": rows.expand(text.token_embedding.weight.detach())}
    with torch.device("meta"):
        full = CLIPText(replace(config, unknown_id=rows.unknown_id))
    full.load_state_dict(state, assign=True)
    return full.requires_grad_(False).eval()
