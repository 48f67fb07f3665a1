"""minisd beside diffusers' own pipelines: the same checkpoint, prompt, settings and seeds give the same pictures.

The checkpoints are small and random; minisd saves them as diffusers folders, or loads what diffusers saved. Both draw
the noise of image i from a CPU generator of the seed + i, in the same order, so nothing has to be handed over.
"""

import pytest
import torch
from lively import lively_checkpoint, mask, picture, pixels

import minisd
from minisd.checkpoints.save import save_checkpoint
from minisd.config import ScheduleConfig

diffusers = pytest.importorskip("diffusers")

PROMPT, NEGATIVE = "a red apple on the table, by Cezanne", "blurry, grey"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saves each kind of model once."""
    made = {}

    def folder_of(kind: str):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("models") / kind
            save_checkpoint(lively_checkpoint(kind), made[kind], layout="diffusers")
        return made[kind]

    return folder_of


def pipeline(folder, cls=diffusers.StableDiffusionPipeline, scheduler="DDIMScheduler", **changes):
    pipe = cls.from_pretrained(folder, safety_checker=None, requires_safety_checker=False, local_files_only=True)
    stable = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **stable | changes)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(n: int, seed: int = 7) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def assert_same_pictures(ours, theirs, *, levels: int = 1):
    """Within one of 255 levels: two float32 implementations may fall on either side of a rounding."""
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        assert pixels(own).std() > 20  # a flat picture would prove nothing
        assert abs(pixels(own) - pixels(other)).max() <= levels


SAMPLERS = {  # ours → diffusers' scheduler, and its settings where they differ from Stable Diffusion's own
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    # its "leading" leaves a step out
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
}
CASES = [(kind, name, 0.0) for kind in ("SD1", "SD2_V") for name in SAMPLERS] + [
    ("SD1", "ddim", 1.0),
    ("SD2_V", "ddim", 1.0),
]
CASES.remove(("SD2_V", "plms", 0.0))  # diffusers extrapolates v where Stability's code, as minisd, extrapolates ε


@pytest.mark.parametrize(("kind", "name", "eta"), CASES)
def test_txt2img_of_every_sampler_is_diffusers(folder, kind, name, eta):
    if name == "lms":
        pytest.importorskip("scipy")
    scheduler, changes = SAMPLERS[name]
    size = {"height": 32, "width": 40, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
    pipe = pipeline(folder(kind), scheduler=scheduler, **changes)
    theirs = pipe(PROMPT, num_inference_steps=10, num_images_per_prompt=2, generator=generators(2), eta=eta, **size)
    ours = minisd.load(folder(kind)).txt2img(
        PROMPT,
        **size,
        steps=10,
        sampler=name,
        eta=eta or None,
        spacing=changes.get("timestep_spacing", "leading"),
        seed=7,
        num_images=2,
        batch_size=2,
    )
    assert_same_pictures(ours, theirs.images)


def test_txt2img_of_what_diffusers_saved_is_diffusers(folder, tmp_path):
    pipe = pipeline(folder("SD2_BASE"))
    pipe.save_pretrained(tmp_path / "saved")
    theirs = pipe([PROMPT, "a dog"], num_inference_steps=12, height=32, width=32, generator=generators(2))
    ours = minisd.load(tmp_path / "saved").txt2img([PROMPT, "a dog"], steps=12, seed=7)
    assert_same_pictures(ours, theirs.images)


@pytest.mark.parametrize("kind", ["SD1", "SD2_V"])
def test_guidance_rescale_is_diffusers(folder, kind):
    size = {"guidance_rescale": 0.7, "height": 32, "width": 32}
    theirs = pipeline(folder(kind))(PROMPT, num_inference_steps=10, generator=generators(1), **size)
    assert_same_pictures(minisd.load(folder(kind)).txt2img(PROMPT, steps=10, seed=7, **size), theirs.images)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_is_diffusers(folder, clip_skip):
    pipe = pipeline(folder("SD1"))
    clip = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)  # where it is depends on transformers' version

    def encode(text: str) -> torch.Tensor:
        ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-1 - clip_skip]
        return clip.final_layer_norm(states)

    with torch.no_grad():
        embeddings = {"prompt_embeds": encode(PROMPT), "negative_prompt_embeds": encode("")}
    theirs = pipe(**embeddings, num_inference_steps=10, generator=generators(1), height=32, width=32)
    ours = minisd.load(folder("SD1")).txt2img(PROMPT, steps=10, seed=7, clip_skip=clip_skip)
    assert_same_pictures(ours, theirs.images)


def test_zero_terminal_snr_is_diffusers(tmp_path):
    checkpoint = lively_checkpoint("SD2_V", schedule=ScheduleConfig(zero_terminal_snr=True))
    save_checkpoint(checkpoint, tmp_path / "model", layout="diffusers")
    size = {"guidance_rescale": 0.7, "height": 32, "width": 32}
    pipe = pipeline(tmp_path / "model", timestep_spacing="trailing")
    theirs = pipe(PROMPT, num_inference_steps=10, generator=generators(1), **size)
    ours = minisd.load(tmp_path / "model").txt2img(PROMPT, steps=10, seed=7, spacing="trailing", **size)
    assert_same_pictures(ours, theirs.images)


@pytest.mark.parametrize(("kind", "eta", "strength"), [("SD1", 0.0, 0.6), ("SD1", 1.0, 1.0), ("SD2_V", 1.0, 0.75)])
def test_img2img_is_diffusers(folder, kind, eta, strength):
    pipe = pipeline(folder(kind), diffusers.StableDiffusionImg2ImgPipeline)
    theirs = pipe(
        PROMPT,
        image=[picture(40, 32)] * 2,
        strength=strength,
        num_inference_steps=12,
        num_images_per_prompt=2,
        generator=generators(2),
        eta=eta,
    )
    ours = minisd.load(folder(kind)).img2img(
        PROMPT, picture(40, 32), strength=strength, steps=12, seed=7, num_images=2, batch_size=2, eta=eta
    )
    assert_same_pictures(ours, theirs.images)


@pytest.mark.parametrize(("kind", "strength"), [("SD1_INPAINT", 1.0), ("SD1_INPAINT", 0.7), ("SD1", 0.7)])
def test_inpaint_is_diffusers_where_the_mask_is_white(folder, kind, strength):
    box = (8, 4, 30, 20)
    pipe = pipeline(folder(kind), diffusers.StableDiffusionInpaintPipeline)
    theirs = pipe(
        PROMPT,
        image=picture(40, 32),
        mask_image=mask(box, 40, 32),
        strength=strength,
        num_inference_steps=12,
        generator=generators(1),
        height=32,
        width=40,
    )
    ours = minisd.load(folder(kind)).inpaint(
        PROMPT, picture(40, 32), mask(box, 40, 32), strength=strength, steps=12, seed=7, feather=0
    )
    assert_same_pictures([ours[0].crop(box)], [theirs.images[0].crop(box)])


def test_the_9_channels_are_diffusers_for_masks_that_cut_through_latents(folder):
    box = (7, 3, 30, 21)
    pipe = pipeline(folder("SD1_INPAINT"), diffusers.StableDiffusionInpaintPipeline)
    size = {"height": 32, "width": 40}
    shown = {"image": picture(40, 32), "mask_image": mask(box, 40, 32)}
    theirs = pipe(PROMPT, num_inference_steps=12, generator=generators(1), **shown, **size)
    (ours,) = minisd.load(folder("SD1_INPAINT")).inpaint(PROMPT, *shown.values(), steps=12, seed=7, feather=0)
    assert_same_pictures([ours.crop(box)], [theirs.images[0].crop(box)])
