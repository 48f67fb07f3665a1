"""Textual Inversion: a new word for the subject, and nothing else learns (Gal et al. 2022).

photos = load_photos("my-dog/", sd.config.image_size)
vectors = train_textual_inversion(sd, photos, "out/", TextualInversionConfig(SubjectConfig("<my-dog>", "dog")))
sd.load_embedding("out/my-dog.safetensors")
sd.txt2img("a <my-dog> in the snow")
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.adapters.embeddings import save_embedding
from minisd.stable_diffusion import StableDiffusion
from minisd.text.tokenizer import Tokenizer
from minisd.training.options import RUN, LoopConfig, Run
from minisd.training.parallel import ALONE, Processes
from minisd.training.subject.photos import Photos
from minisd.training.subject.recipe import Scores, SubjectConfig, SubjectRecipe, learn, with_networks
from minisd.training.weights import copied

MOST = 16  # vectors of one word; CLIP reads 75 in all


@dataclass(frozen=True)
class TextualInversionConfig:
    """What is learnt, and how. The defaults are for Stable Diffusion; small.py has others.

    Attributes:
        subject: the subject in words; its token is the new word, such as <my-dog>.
        loop: the training loop.
        vectors: rows of the token embedding that the word has, 1 to 16: more hold more detail, and heed prompts less.
        initial: words whose vectors it starts from, repeated where they are fewer; the class word when empty.
    """

    subject: SubjectConfig
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=3000, batch_size=4, lr=5e-3, warmup=0, ema=None))
    vectors: int = 1
    initial: str = ""

    def __post_init__(self):
        if not 1 <= self.vectors <= MOST:
            raise ValueError(f"vectors={self.vectors}: a word has 1 to {MOST}")


class AddedRows(nn.Module):
    """A token embedding with rows after its own: they alone learn, so nothing can touch the others."""

    def __init__(self, table: nn.Embedding, rows: Tensor):
        super().__init__()
        self.table = table
        self.added = nn.Embedding.from_pretrained(rows, freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        old = self.table.num_embeddings
        known, added = self.table(ids.clamp(max=old - 1)), self.added((ids - old).clamp(min=0))
        return torch.where((ids >= old)[..., None], added, known)


def train_textual_inversion(
    sd: StableDiffusion,
    photos: Photos,
    folder: str | os.PathLike,
    config: TextualInversionConfig,
    run: Run = RUN,
    group: Processes = ALONE,
    *,
    scores: Scores | None = None,
) -> Tensor:
    """The vectors 'n d' of the new word; sd stays as it is. Saved in the layouts of diffusers, A1111 and kohya."""
    folder, token = Path(folder), config.subject.token
    stem = folder / (re.sub(r"[^\w-]+", "", token) or "embedding")
    if stem.name in ("state", "photos", "class", "best"):
        raise ValueError(f"the token {token!r} would name the result like a file of the training: choose another")
    recipe = textual_inversion_recipe(sd, photos, folder, config, scores=scores)
    learn(recipe, config, sd, photos, run, group)
    vectors = recipe.sd.text_encoder.token_embedding.added.weight.detach().cpu()
    if group.is_first:
        save_embedding(stem.with_suffix(".safetensors"), token, vectors, layout="diffusers")
        save_embedding(stem.with_suffix(".pt"), token, vectors, layout="a1111", step=config.loop.steps)
        save_embedding(stem.with_name(f"{stem.name}-kohya.safetensors"), token, vectors, layout="kohya")
    return vectors


def textual_inversion_recipe(
    sd: StableDiffusion,
    photos: Photos,
    folder: Path,
    config: TextualInversionConfig,
    *,
    scores: Scores | None = None,
) -> SubjectRecipe:
    """Frozen networks, and a token embedding with rows after its own."""
    token = config.subject.token
    half = config.loop.precision == "bfloat16"
    text = copied(sd.text_encoder, learn=False, half=half)
    table = text.token_embedding
    learner = with_networks(sd, unet=copied(sd.unet, learn=False, half=half), text=text)
    rows = initial_rows(learner.tokenizer, table.weight, config.initial or config.subject.class_word, config.vectors)
    ids = learner.tokenizer.add_token(token, config.vectors)
    if ids[0] != table.num_embeddings:
        raise ValueError(
            f"the text encoder has {table.num_embeddings} tokens and the next free one is {ids[0]}: the new rows would "
            "not follow the old ones"
        )
    text.token_embedding = AddedRows(table, rows)
    return SubjectRecipe(
        "textual inversion",
        learner,
        config.subject,
        photos,
        folder,
        phrase=token,
        precision=config.loop.precision,
        scores=scores,
    )


def initial_rows(tokenizer: Tokenizer, table: Tensor, words: str, vectors: int) -> Tensor:
    """The rows 'vectors d' of the words' tokens in order, from the first again where they are fewer."""
    if not (ids := tokenizer.encode(words)):
        raise ValueError(f"{words!r} holds no word to start from: give one, such as the class")
    return table.detach()[[ids[i % len(ids)] for i in range(vectors)]].clone()
