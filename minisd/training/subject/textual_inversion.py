"""Textual Inversion: a new word for the subject, and nothing else learns (Gal et al. 2022).

photos = load_photos("my-dog/", sd.config.image_size)
vectors = train_textual_inversion(sd, photos, "out/", TextualInversionConfig(SubjectConfig("<my-dog>", "dog")))
sd.load_embedding("out/my-dog.safetensors")
sd.txt2img("a <my-dog> in the snow")
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.adapters.embeddings import save_embedding
from minisd.stable_diffusion import StableDiffusion
from minisd.text.tokenizer import Tokenizer
from minisd.training.options import LoopConfig
from minisd.training.subject.config import SubjectConfig
from minisd.training.subject.method import Method
from minisd.training.subject.recipe import SubjectRecipe, frozen_copy, with_networks
from minisd.training.subject.small import small_preset
from minisd.training.subject.validation import WORK_FILES
from minisd.training.weights import copied

MOST = 16  # vectors of one word; CLIP reads 75 in all


@dataclass(frozen=True)
class TextualInversionConfig:
    """What is learnt, and how. The defaults are for Stable Diffusion.

    Attributes:
        subject: the subject in words; its token is the new word, such as <my-dog>.
        loop: the training loop.
        vectors: vectors per token, 1 to 16: more learn more detail, and follow prompts less.
        initial: initializer words, whose vectors it starts from; the class word when empty.
    """

    subject: SubjectConfig
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=3000, batch_size=4, lr=5e-3, warmup=0, ema=None))
    vectors: int = 1
    initial: str = ""

    def __post_init__(self):
        if not 1 <= self.vectors <= MOST:
            raise ValueError(f"vectors={self.vectors}: a word has 1 to {MOST}")

    def for_small_model(self) -> TextualInversionConfig:
        return small_preset(self, steps=600, lr=5e-3, vectors=4)


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


def learner(sd: StableDiffusion, config: TextualInversionConfig) -> StableDiffusion:
    """Frozen networks, and a token embedding with rows after its own."""
    stem(config)
    half = config.loop.precision == "bfloat16"
    text = copied(sd.text_encoder, learn=False, half=half)
    table = text.token_embedding
    model = with_networks(sd, unet=copied(sd.unet, learn=False, half=half), text=text)
    rows = initial_rows(model.tokenizer, table.weight, config.initial or config.subject.class_word, config.vectors)
    ids = model.tokenizer.add_token(config.subject.token, config.vectors)
    if ids[0] != table.num_embeddings:
        raise ValueError(
            f"the text encoder has {table.num_embeddings} tokens and the next free one is {ids[0]}: the new rows would "
            "not follow the old ones"
        )
    text.token_embedding = AddedRows(table, rows)
    return model


def stem(config: TextualInversionConfig) -> str:
    """Of the files' names. ValueError for one that a training uses itself."""
    name = re.sub(r"[^\w-]+", "", config.subject.token) or "embedding"
    if f"{name}.safetensors" in WORK_FILES:
        raise ValueError(
            f"the token {config.subject.token!r} would name the result like a file of the training: choose another"
        )
    return name


def result(recipe: SubjectRecipe, sd: StableDiffusion, config: TextualInversionConfig) -> Tensor:
    """The vectors 'n d' of the new word."""
    return recipe.sd.text_encoder.token_embedding.added.weight.detach().cpu()


def save(vectors: Tensor, sd: StableDiffusion, folder: Path, config: TextualInversionConfig) -> None:
    token, name = config.subject.token, stem(config)
    save_embedding(folder / f"{name}.safetensors", token, vectors, layout="diffusers")
    save_embedding(folder / f"{name}.pt", token, vectors, layout="a1111", step=config.loop.steps)
    save_embedding(folder / f"{name}-kohya.safetensors", token, vectors, layout="kohya")


def apply(sd: StableDiffusion, vectors: Tensor, folder: Path, config: TextualInversionConfig) -> StableDiffusion:
    model = frozen_copy(sd)
    model.add_embedding(config.subject.token, vectors)
    return model


def initial_rows(tokenizer: Tokenizer, table: Tensor, words: str, vectors: int) -> Tensor:
    """The rows 'vectors d' of the words' tokens in order, from the first again where they are fewer."""
    if not (ids := tokenizer.encode(words)):
        raise ValueError(f"{words!r} holds no word to start from: give one, such as the class")
    return table.detach()[[ids[i % len(ids)] for i in range(vectors)]].clone()


METHOD = Method(
    name="textual inversion",
    config=TextualInversionConfig,
    learner=learner,
    result=result,
    save=save,
    apply=apply,
    writes="the embedding in the layouts of diffusers (.safetensors), A1111 (.pt) and kohya (-kohya.safetensors)",
    phrase=lambda subject: subject.token,
    token=None,
)
train_textual_inversion = METHOD.train
