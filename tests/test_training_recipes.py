"""The recipes: their losses as formulas, and tiny trainings that learn."""

import json
import math
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training_tiny import DDPM, LOOP, MINI, MODEL, RUN, frozen_networks, pictures, train_recipe

import minisd
from minisd.checkpoints.load import load_checkpoint
from minisd.checkpoints.save import save_checkpoint
from minisd.config import ScheduleConfig, VAEConfig
from minisd.models.vae import VAE, DiagonalGaussian
from minisd.nn.blocks import ResBlock
from minisd.pipeline import build_schedule
from minisd.schema import from_dict
from minisd.text.tokenizer import Tokenizer
from minisd.training.data import Augmentation, Pictures
from minisd.training.draws import Draws
from minisd.training.loss import (
    adaptive_weight,
    contrastive_loss,
    gradient_loss,
    hinge_loss,
    kl_to_standard,
    min_snr_weights,
)
from minisd.training.parallel import Processes
from minisd.training.progress import read_log
from minisd.training.recipes.clip import CLIPRecipe, train_clip
from minisd.training.recipes.ddpm import DDPMRecipe, load_ddpm, train_ddpm
from minisd.training.recipes.latent_diffusion import (
    LatentDiffusionRecipe,
    build_cache,
    load_cache,
    train_latent_diffusion,
)
from minisd.training.recipes.mini import MiniConfig, mini_config, train_mini
from minisd.training.recipes.patchgan import PatchDiscriminator
from minisd.training.recipes.vae import VAERecipe, latent_scale, train_vae
from minisd.training.weights import seeded

LDM = np.load(Path(__file__).parent / "data" / "training_ldm.npz")


def draws(n: int, step: int = 0) -> Draws:
    return Draws(0, step, n, slice(0, n))


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_log(folder / "log.jsonl")]


# ------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_min_snr_weighs_the_error_of_x_0_by_the_clamped_snr_whatever_is_predicted(prediction):
    schedule, t = build_schedule(ScheduleConfig()), torch.tensor([1, 300, 999])
    x_0, noise, wrong = (torch.randn(3, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    x_t = schedule.q_sample(x_0, t, noise)
    errors = {
        "x_0": x_0 - wrong,
        "eps": noise - schedule.eps_from_x_0(x_t, t, wrong),
        "v": schedule.v_target(x_0, t, noise) - schedule.v_from_x_0(x_t, t, wrong),
    }
    weights = min_snr_weights(schedule, t, 5.0, prediction)
    weighted = weights * errors[prediction].square().mean(1)
    expected = schedule.snr[t].clamp(max=5) * errors["x_0"].square().mean(1)
    torch.testing.assert_close(weighted, expected, rtol=1e-6, atol=0)


def test_without_gamma_all_times_weigh_alike_and_a_bad_one_is_refused():
    schedule, t = build_schedule(ScheduleConfig()), torch.tensor([0, 999])
    assert min_snr_weights(schedule, t, None, "eps").tolist() == [1, 1]
    with pytest.raises(ValueError, match="gamma 0"):
        min_snr_weights(schedule, t, 0, "eps")


def test_kl_to_the_standard_normal_is_compvis():
    config = VAEConfig(scale_factor=1.0)
    posterior = DiagonalGaussian.from_moments(torch.from_numpy(LDM["moments2"]), config)
    torch.testing.assert_close(kl_to_standard(posterior), torch.from_numpy(LDM["out_dist2_kl_standard"]))


def test_pairs_that_agree_have_no_contrastive_loss_and_shuffled_ones_all_of_it():
    vectors = torch.eye(4)
    loss, accuracy = contrastive_loss(3 * vectors, vectors, torch.tensor(50.0))
    assert loss < 1e-6
    assert accuracy == 1
    loss, accuracy = contrastive_loss(vectors.roll(1, 0), vectors, torch.tensor(50.0))
    assert loss.item() == pytest.approx(50, rel=1e-4)
    assert accuracy == 0
    loss, _ = contrastive_loss(torch.ones(4, 2), torch.ones(4, 2), torch.tensor(50.0))
    assert loss.item() == pytest.approx(math.log(4))


def test_gradient_loss_sees_edges_and_no_uniform_shift():
    image = torch.zeros(1, 1, 8, 8)
    assert gradient_loss(image + 0.3, image) == 0
    step = image.clone()
    step[..., 4:] = 1
    assert gradient_loss(step, image, scales=1).item() == pytest.approx(1 / 7)
    assert gradient_loss(step, image, scales=9).item() == pytest.approx((1 / 7 + 1 / 3 + 1) / 3)  # of 8, 4 and 2 pixels


def test_hinge_loss_asks_for_a_margin_of_one_on_either_side():
    assert hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0])) == 0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.5])).item() == pytest.approx(0.5 * (1 + 1.5))


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversary = (last * torch.tensor([3.0, 4.0])).sum(), 0.1 * last[0]
    weight = adaptive_weight(reconstruction, adversary, last)
    assert weight.item() == pytest.approx(5 / (0.1 + 1e-4), rel=1e-5)
    assert not weight.requires_grad
    assert adaptive_weight(reconstruction, 0 * adversary, last).item() == 1e4


# ------------------------------------------------------------------------------------------------- autoencoder


def test_the_vae_learns_to_reconstruct_and_measures_its_scale(tmp_path):
    config = replace(MINI.vae, loop=replace(LOOP, steps=60, lr=5e-3), augmentation=Augmentation())
    vae = train_vae(pictures(), tmp_path, config, RUN)
    losses = losses_of(tmp_path)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    latents = vae.encode(pictures().images(range(11))).sample(torch.Generator().manual_seed(1))
    assert latents.std().item() == pytest.approx(1, abs=0.05)
    assert vae.config.scale_factor != 1


def test_the_residual_blocks_of_an_autoencoder_begin_as_their_skips():
    blocks = [module for module in VAERecipe(pictures(), MINI.vae).vae.modules() if isinstance(module, ResBlock)]
    assert blocks
    for block in blocks:
        x = torch.randn(1, block.conv1.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(block(x), block.skip(x))


def test_the_scale_is_one_over_the_deviation_of_sampled_latents():
    with seeded("test"):
        vae = VAE(replace(MODEL.vae, scale_factor=1.0))
    posterior = vae.encode(pictures().images(range(11)))
    variance = posterior.mean.var() + posterior.std.square().mean()
    assert latent_scale(vae, pictures()) == pytest.approx(variance.item() ** -0.5, rel=0.05)


def test_each_player_is_moved_by_its_own_loss_alone():
    recipe = VAERecipe(pictures(), replace(MINI.vae, gan_weight=0.5, gan_start=0, gan_channels=8, gan_layers=2))
    vae, discriminator = recipe.networks["vae"], recipe.networks["discriminator"]

    def gradients(*names):
        recipe.networks.zero_grad()
        found = recipe.loss(torch.arange(4), draws(4))
        sum(found[name] for name in names).backward()
        return [[p.grad.clone() for p in n.parameters() if p.grad is not None] for n in (vae, discriminator)]

    of_vae, of_discriminator = gradients("discriminator")
    assert not of_vae
    assert of_discriminator
    of_vae, of_discriminator_by_vae = gradients("adversary")
    assert of_vae
    assert not of_discriminator_by_vae
    _, of_discriminator_by_all = gradients("loss")
    assert all(torch.equal(a, b) for a, b in zip(of_discriminator, of_discriminator_by_all, strict=True))


def test_the_rival_pulls_half_as_hard_as_the_reconstruction_at_the_last_layer():
    recipe = VAERecipe(
        pictures(), replace(MINI.vae, gan_weight=0.5, gan_start=0, gan_channels=8, gan_layers=2, kl_weight=0.0)
    )
    last = recipe.vae.decoder.conv_out.weight
    found = recipe.loss(torch.arange(4), draws(4))
    reconstruction = found["pixel"] + found["edges"]
    rest = found["loss"] - reconstruction - found["discriminator"]
    pull = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (rest, reconstruction)]
    assert (pull[0] / pull[1]).item() == pytest.approx(0.5, rel=0.05)


def test_the_rival_begins_at_its_step():
    recipe = VAERecipe(pictures(), replace(MINI.vae, gan_weight=0.5, gan_start=3, gan_channels=8, gan_layers=2))
    assert "discriminator" not in recipe.loss(torch.arange(4), draws(4, step=2))
    assert "discriminator" in recipe.loss(torch.arange(4), draws(4, step=3))


def test_a_discriminator_judges_patches_each_picture_by_itself():
    with seeded("test"):
        discriminator = PatchDiscriminator(8, 2)
    image = torch.rand(3, 3, 32, 32)
    logits = discriminator(image)
    assert logits.shape[1] == 1
    assert min(logits.shape[2:]) > 1
    torch.testing.assert_close(discriminator(image[:1]), logits[:1], atol=1e-6, rtol=1e-5)


def test_a_vae_training_with_a_rival_resumes_to_the_same_bits(tmp_path):
    config = replace(MINI.vae, gan_weight=0.5, gan_start=4, gan_channels=8, gan_layers=2)
    train_vae(pictures(), tmp_path / "a", config, RUN)
    loss = VAERecipe.loss
    VAERecipe.loss = lambda self, e, d: (_ for _ in ()).throw(KeyboardInterrupt) if d.step == 8 else loss(self, e, d)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_vae(pictures(), tmp_path / "b", config, RUN)
    finally:
        VAERecipe.loss = loss
    train_vae(pictures(), tmp_path / "b", config, RUN)
    a, b = ((tmp_path / name / "state.safetensors").read_bytes() for name in "ab")
    assert a == b


# ---------------------------------------------------------------------------------------------------------- clip


def test_clip_learns_which_caption_belongs_to_which_picture(tmp_path):
    discs = pictures(20)
    loop = replace(LOOP, steps=150, batch_size=20, lr=5e-3, weight_decay=0.0)
    clip = train_clip(discs, tmp_path, replace(MINI.clip, loop=loop), RUN)
    recipe = CLIPRecipe(discs, MINI.clip)
    image = clip.vision(recipe.resized(discs.images(range(20))))
    colours = ["red", "green", "blue", "yellow"]
    text = clip.text.embed(Tokenizer()([f"a {colour} disc" for colour in colours]))
    found = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1).argmax(1)
    assert (found == torch.arange(20) % 4).float().mean() >= 0.9
    assert clip.text.token_embedding.num_embeddings == 49408


def test_a_word_that_no_caption_has_shares_the_unknown_row(tmp_path):
    clip = train_recipe("clip", tmp_path)
    table, tokenizer = clip.text.token_embedding.weight, Tokenizer()
    zebra, walrus, disc = (table[tokenizer.encode(word)[0]] for word in ("zebra", "walrus", "disc"))
    assert torch.equal(zebra, walrus)
    assert not torch.equal(zebra, disc)


def test_unknown_tokens_are_shown_in_place_of_words_only():
    recipe = CLIPRecipe(pictures(), replace(MINI.clip, unknown=1.0))
    ids = recipe.ids[:3]
    veiled = recipe._veiled(ids, draws(3))
    config = recipe.text.config
    special = (ids == config.bos_id) | (ids == config.eos_id)
    assert torch.equal(veiled[special], ids[special])
    assert (veiled[~special] == recipe.rows.unknown).all()


def test_clip_refuses_micro_batches_and_towers_that_do_not_meet():
    with pytest.raises(ValueError, match="contrastive batch cannot be cut"):
        replace(MINI.clip, loop=replace(LOOP, gradient_accumulation=2))
    with pytest.raises(ValueError, match="projection_dim is 8 for text, 9 for vision"):
        replace(MINI.clip, vision=replace(MODEL.vision, projection_dim=9))


# ---------------------------------------------------------------------------------------------- latent diffusion


@pytest.fixture(scope="module")
def latent():
    vae, text = frozen_networks()
    return vae, text, build_cache(pictures(), vae, text.config)


def unet_config(latent, **fields):
    vae, text, _ = latent
    return replace(MINI.unet, **{"model": replace(MODEL, vae=vae.config, text=text.config), **fields})


def test_the_cache_holds_what_the_networks_say(latent):
    vae, _, cache = latent
    discs = pictures()
    torch.testing.assert_close(cache.mean[3:4], vae.encode(discs.images([3])).mean, atol=1e-5, rtol=1e-5)
    caption = discs.captions[3][1]
    assert torch.equal(cache.ids[cache.first[3] + 1], Tokenizer()([caption])[0].int())
    assert cache.count.tolist() == [len(texts) for texts in discs.captions]


def test_every_caption_of_a_picture_is_shown_and_a_tenth_is_dropped(latent):
    vae, text, cache = latent
    recipe = LatentDiffusionRecipe(vae, text, cache, unet_config(latent))
    seen = []

    def unet(x_t, t, cond):
        seen.append(cond.context)
        return x_t

    recipe.unet = unet
    rows = torch.full((2000,), 3)
    recipe.loss(rows, draws(2000))
    expected = recipe.states(torch.stack([cache.empty, *cache.ids[cache.first[3] :][:2]]))
    shares = [((seen[0] - states).abs().amax((1, 2)) < 1e-5).float().mean().item() for states in expected]  # rounding
    assert shares == pytest.approx([0.1, 0.45, 0.45], abs=0.04)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_network_that_knows_the_picture_has_no_loss(latent, prediction):
    vae, text, cache = latent
    model = replace(unet_config(latent).model, prediction=prediction)
    sharp = replace(cache, std=torch.zeros_like(cache.std))
    recipe = LatentDiffusionRecipe(vae, text, sharp, unet_config(latent, model=model))
    x_0, schedule = cache.mean[2:3], recipe.schedule

    def unet(x_t, t, cond):
        known = x_0.expand_as(x_t)
        return schedule.eps_from_x_0(x_t, t, known) if prediction == "eps" else schedule.v_from_x_0(x_t, t, known)

    recipe.unet = unet
    assert recipe.loss(torch.full((16,), 2), draws(16))["mse"] < 1e-6


def test_the_cache_is_kept_and_made_anew_for_other_networks(tmp_path, monkeypatch):
    train_recipe("unet", tmp_path)
    made = []
    import minisd.training.recipes.latent_diffusion as module

    monkeypatch.setattr(module, "build_cache", lambda *args: made.append(args) or build_cache(*args))
    train_recipe("unet", tmp_path)
    assert not made
    assert load_cache(tmp_path / "cache.safetensors", "another digest") is None


def test_processes_share_the_encoding_of_a_data_set(latent):
    vae, text, whole = latent

    class Second(Processes):
        """The second of two, whose messages nobody answers."""

        def sum_(self, tensors):
            pass

    part = build_cache(pictures(), vae, text.config, Second(rank=1, count=2))
    torch.testing.assert_close(part.mean[1::2], whole.mean[1::2], atol=1e-5, rtol=1e-5)  # other batches
    assert not part.mean[::2].any()


def test_pictures_are_shown_as_often_as_they_are_to_be_visited(latent, tmp_path):
    vae, text, _ = latent
    often = replace(pictures(3), visits=(1, 4, 2))
    recipe = LatentDiffusionRecipe(vae, text, build_cache(often, vae, text.config), unet_config(latent))
    assert len(recipe) == len(VAERecipe(often, MINI.vae)) == len(CLIPRecipe(often, MINI.clip)) == 7
    assert recipe.cache.visited.tolist() == [0, 1, 1, 1, 1, 2, 2]


def test_a_training_at_a_constant_rate_ends_or_goes_on_at_any_step(latent, tmp_path):
    vae, text, _ = latent

    def trained(folder, steps):
        loop = replace(LOOP, decay="constant", steps=steps)
        return train_latent_diffusion(pictures(), vae, text, folder, unet_config(latent, loop=loop), RUN)

    trained(tmp_path / "on", 6)
    on, whole = trained(tmp_path / "on", 10), trained(tmp_path / "whole", 10)
    assert all(torch.equal(a, b) for a, b in zip(on.parameters(), whole.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds 10 steps, more than the 6 asked for"):
        trained(tmp_path / "on", 6)


def test_the_unet_trains_in_bfloat16_too(tmp_path):
    train_recipe("unet", tmp_path / "a", precision="bfloat16")
    train_recipe("unet", tmp_path / "b")
    a, b = (losses_of(tmp_path / name)[-1] for name in "ab")
    assert a != b
    assert a == pytest.approx(b, rel=0.05)


def test_pictures_without_captions_are_refused(latent, tmp_path):
    vae, text, _ = latent
    discs = pictures()
    bare = Pictures(discs.pixels, ((),) * 11, discs.names, discs.digest)
    with pytest.raises(ValueError, match="11 of 11 pictures have no caption, first: disc 0"):
        train_latent_diffusion(bare, vae, text, tmp_path, unet_config(latent), RUN)


def test_a_config_of_other_networks_is_refused(latent, tmp_path):
    vae, text, _ = latent
    config = replace(MINI.unet, model=replace(MODEL, vae=replace(MODEL.vae, scale_factor=0.5)))
    with pytest.raises(ValueError, match="another VAE or text encoder"):
        train_latent_diffusion(pictures(), vae, text, tmp_path, config, RUN)


# ---------------------------------------------------------------------------------------------------------- ddpm


def test_the_ddpm_learns_and_its_file_draws_the_same_pictures(tmp_path):
    loop = replace(LOOP, steps=80, lr=5e-3)
    model = train_ddpm(pictures(), tmp_path, replace(DDPM, loop=loop), RUN)
    losses = losses_of(tmp_path)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    loaded = load_ddpm(tmp_path / "ddpm.safetensors")
    assert loaded.config == model.config
    a, b = (m.sample(2, seed=3, steps=10) for m in (model, loaded))
    assert [image.tobytes() for image in a] == [image.tobytes() for image in b]
    assert a[0].size == (16, 16)


def test_a_seed_is_a_picture_whatever_is_drawn_beside_it():
    model = DDPMRecipe(pictures(), DDPM).model
    alone, second = model.sample(1, seed=5, steps=5)[0], model.sample(2, seed=4, steps=5)[1]
    np.testing.assert_allclose(np.asarray(alone, int), np.asarray(second, int), atol=1)


def test_learned_variances_train_and_sample(tmp_path):
    config = replace(DDPM, learned_variance=True, unet=replace(DDPM.unet, out_channels=6))
    model = train_ddpm(pictures(), tmp_path, config, RUN)
    assert {"loss", "simple"} <= read_log(tmp_path / "log.jsonl")[-1].keys()
    *_, last = model.steps(1, steps=4)
    assert last.x.isfinite().all()
    with pytest.raises(ValueError, match="learned_variance=True they are 3 and 6"):
        replace(DDPM, learned_variance=True)


def test_few_pictures_are_warned_of_and_none_of_another_size_are_taken(tmp_path):
    with pytest.warns(UserWarning, match="3 pictures for batches of 8"):
        train_ddpm(pictures(3), tmp_path, DDPM, RUN)
    with pytest.raises(ValueError, match="pictures have 32 px, the config 16"):
        train_ddpm(pictures(3, 32), tmp_path, DDPM, RUN)


def test_a_file_that_is_no_ddpm_is_refused(tmp_path):
    train_recipe("ddpm", tmp_path)
    with pytest.raises(ValueError, match="no pixel-space DDPM"):
        load_ddpm(tmp_path / "state.safetensors")


def test_the_decoder_learns_on_alone_and_latents_stay_what_they_were(tmp_path):
    before = train_vae(pictures(), tmp_path, MINI.vae, RUN).state_dict()
    after = train_vae(pictures(), tmp_path, replace(MINI.vae, decoder_loop=LOOP), RUN)
    moved = {
        name.partition(".")[0] for name, tensor in after.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == {"decoder", "post_quant_conv"}
    assert after.config.scale_factor == train_vae(pictures(), tmp_path, MINI.vae, RUN).config.scale_factor
    assert read_log(tmp_path / "decoder" / "log.jsonl")[-1]["step"] == LOOP.steps


# ---------------------------------------------------------------------------------------------------------- mini


def test_the_whole_recipe_gives_a_model_that_loads_and_draws(tmp_path):
    train_mini(pictures(), tmp_path, MINI, RUN)
    with pytest.warns(UserWarning, match="float16"):
        sd = minisd.load(tmp_path / "mini.safetensors")
    assert sd.config.prediction == "v"
    assert sd.config.vae.scale_factor != 1
    assert sd.vision_encoder is not None
    assert sd.txt2img("a red disc, size 1", steps=2)[0].size == (16, 16)
    before = (tmp_path / "mini.safetensors").read_bytes()
    train_mini(pictures(), tmp_path, MINI, RUN)
    assert (tmp_path / "mini.safetensors").read_bytes() == before


def test_the_models_file_holds_each_row_of_the_token_embedding_once_and_conversion_unfolds_it(tmp_path):
    made = train_mini(pictures(), tmp_path, MINI, RUN)
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    table = made.networks["text"].token_embedding.weight
    folded = load_file(tmp_path / "mini.safetensors")
    assert folded[name].shape[0] < 40 < 49408 == len(folded[name + ".minisd_rows"])
    assert "unknown" not in " ".join(load_checkpoint(tmp_path / "mini.safetensors").report)
    for layout in ("ldm", "diffusers"):
        save_checkpoint(
            load_checkpoint(tmp_path / "mini.safetensors"), tmp_path / f"{layout}.safetensors", layout=layout
        )
        again = load_checkpoint(tmp_path / f"{layout}.safetensors")
        assert torch.equal(again.networks["text"].token_embedding.weight, table.half())
        assert again.config.text.unknown_id == made.config.text.unknown_id
    assert load_file(tmp_path / "ldm.safetensors")[name].shape == table.shape


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished training."""
    folder = tmp_path_factory.mktemp("trained")
    train_mini(pictures(), folder, MINI, RUN)
    return folder


def test_a_training_starts_from_the_networks_of_files(tmp_path, trained):
    """VAE and CLIP as they are, from a file of each; the U-Net of a whole model learns on."""
    whole = trained / "mini.safetensors"
    first = load_checkpoint(whole, cast=lambda _: torch.float32).networks
    parts = tuple(str(trained / part) for part in ("vae/vae.safetensors", "clip/clip.safetensors"))
    still = replace(MINI, unet=replace(MINI.unet, loop=replace(LOOP, lr=1e-12, weight_decay=0.0)))
    apart = train_mini(pictures(), tmp_path / "apart", replace(MINI, start=parts), RUN)
    on = train_mini(pictures(), tmp_path / "on", replace(still, start=(str(whole),)), RUN)
    for name, network in first.items():
        for made in (apart, on) if name != "unet" else (on,):
            assert made.networks[name].config == network.config
            assert not any(weight.requires_grad for weight in made.networks[name].parameters())
            for ours, theirs in zip(made.networks[name].parameters(), network.parameters(), strict=True):
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-8)
    assert {p.name for p in (tmp_path / "on").iterdir()} == {"unet", "mini.safetensors", "mini.json"}
    steps = [load_checkpoint(tmp_path / name / "mini.safetensors").global_step for name in ("apart", "on")]
    assert steps == [LOOP.steps, 2 * LOOP.steps]
    assert from_dict(MiniConfig, json.loads((tmp_path / "on" / "mini.json").read_text())).start == (str(whole),)


def changed_unet(**changes):
    return replace(MINI, unet=replace(MINI.unet, model=replace(MODEL, **changes)))


@pytest.mark.parametrize(
    ("plan", "file", "sentence"),
    [
        (changed_unet(unet=replace(MODEL.unet, channels=32)), "mini.safetensors", "unet.channels was 16, is 32"),
        (changed_unet(prediction="eps"), "mini.safetensors", 'prediction was "v", is "eps"'),
        (changed_unet(schedule=ScheduleConfig("cosine", 100)), "mini.safetensors", "schedule.kind was"),
        (
            changed_unet(unet=replace(MODEL.unet, context_dim=8)),
            "clip/clip.safetensors",
            "has width 16, the U-Net wants 8",
        ),
        (MINI, "half.safetensors", "half of a CLIP"),
        (MINI, "ddpm.safetensors", "holds no VAE, CLIP or U-Net"),
        (MINI, "missing.safetensors", "missing.safetensors"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_anything_is_learnt(plan, file, sentence, trained, tmp_path):
    if file.startswith("half"):
        half = load_file(trained / "clip" / "clip.safetensors")
        save_file({k: v for k, v in half.items() if not k.startswith("embedder.")}, trained / file)
    if file.startswith("ddpm"):
        save_file({"weight": torch.zeros(3)}, trained / file)
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)):
        train_mini(pictures(), tmp_path / "run", replace(plan, start=(str(trained / file),)), RUN)
    assert not (tmp_path / "run").exists()


def test_a_training_does_not_write_over_what_it_starts_from(trained):
    before = (trained / "mini.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is what this training will write: give it another folder"):
        train_mini(pictures(), trained, replace(MINI, start=(str(trained / "mini.safetensors"),)), RUN)
    assert (trained / "mini.safetensors").read_bytes() == before


def test_the_vae_of_a_training_takes_the_place_of_another_models(trained):
    sd = minisd.load(trained / "mini.safetensors", vae=trained / "vae" / "vae.safetensors", dtype=torch.float32)
    own = minisd.load(trained / "mini.safetensors", dtype=torch.float32)
    assert sd.config.vae == own.config.vae
    assert all(torch.equal(a, b) for a, b in zip(sd.vae.parameters(), own.vae.parameters(), strict=True))


def test_equivariance_shows_the_decoder_latents_shrunk_and_turned_as_the_pictures_are():
    """Where latents are halved pictures, those of a moved picture are the moved latents; in no other turn they are."""
    recipe = VAERecipe(pictures(), replace(MINI.vae, equivariance=1.0))
    corner = torch.zeros(1, 3, 32, 32)
    corner[..., :16, :8] = 1  # looks different in every turn
    halved = torch.nn.functional.avg_pool2d(corner, 2)
    sides, turns = set(), set()
    for step in range(24):
        small, latent = recipe._moved(corner, halved, step)
        apart = [(torch.nn.functional.avg_pool2d(small, 2).rot90(k, (2, 3)) - latent).abs().mean() for k in range(4)]
        assert apart[0] < 0.03
        assert min(apart[1:]) > 0.1
        sides.add(latent.shape[-1])
        turns |= {k for k in range(4) if small.rot90(-k, (2, 3))[..., 0, 0].min() > 0.5}
    assert len(sides) > 6
    assert min(sides) == 4
    assert turns == {0, 1, 2, 3}
    recipe = VAERecipe(pictures(), MINI.vae)
    assert all(recipe._moved(corner, halved, step)[0] is corner for step in range(24))


@pytest.mark.parametrize("size", [8, 44, 46, 176, 208])
def test_pictures_of_any_size_shrink_as_their_latents_do_and_never_below_what_a_rival_can_judge(size):
    recipe = VAERecipe(pictures(size=size), replace(MINI.vae, equivariance=1.0, gan_weight=0.5, gan_layers=1))
    for step in range(24):
        image, z = recipe._moved(torch.zeros(1, 1, size, size), torch.zeros(1, 1, size // 2, size // 2), step)
        assert image.shape[-1] == 2 * z.shape[-1] >= 6


def test_a_rival_judges_shrunk_pictures_too_and_the_divergence_is_that_of_the_whole_picture():
    config = replace(MINI.vae, equivariance=1.0, gan_weight=0.5, gan_start=0, gan_layers=1, gan_channels=8)
    recipes = [VAERecipe(pictures(), each) for each in (config, replace(config, equivariance=0.0))]
    for step in range(8):
        moved, still = (r.loss(torch.arange(2), Draws(0, step, 2, slice(0, 2))) for r in recipes)
        assert moved["loss"].isfinite()
        assert moved["kl"].item() == still["kl"].item()


def test_a_prompt_of_words_that_no_caption_had_is_drawn_with_a_warning_that_names_them(tmp_path):
    sd = train_mini(pictures(), tmp_path, MINI, RUN)
    with pytest.warns(UserWarning, match="never taught 'xylophone': nothing is drawn of it") as warned:
        sd.encode_prompt("a (blue) xylophone, sks disc")
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.encode_prompt(["a blue disc", ""])


def test_the_plan_of_the_mini_model_fits_forty_megabytes_without_the_unused_rows():
    from minisd.family.clip_vision import CLIPVision
    from minisd.models.clip import CLIPText
    from minisd.models.unet import UNet

    config = mini_config()
    model = config.unet.model
    with torch.device("meta"):
        text = CLIPText(replace(model.text, vocab_size=3500))
        networks = [UNet(model.unet), VAE(config.vae.vae), text, CLIPVision(config.clip.vision)]
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes[1] <= 6e6
    assert 2 * sum(sizes) <= 40e6


@pytest.mark.parametrize("config", [mini_config(), mini_config(gpu=True), DDPM])
def test_a_recipe_can_be_written_down_as_json_and_read_back(config):
    assert from_dict(type(config), json.loads(json.dumps(asdict(config)))) == config
