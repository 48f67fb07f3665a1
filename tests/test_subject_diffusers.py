"""DreamBooth, Textual Inversion and LoRA step by step beside diffusers' examples, on the same draws."""

from dataclasses import replace

import pytest
import torch
from subject_tiny import CONFIGS, LOOP, model, train

from minisd.checkpoints.keymaps import keymap, to_official
from minisd.checkpoints.lora_files import names_to_official
from minisd.checkpoints.save import save_checkpoint
from minisd.training.progress import read_log
from minisd.training.state import learnt_weights
from minisd.training.subject import dreambooth, lora, textual_inversion

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from minisd.bench import diffusers_training as theirs

STEPS = 3
UNCLIPPED = 1e9


@pytest.fixture
def seen(monkeypatch):
    """What a training was about: its recipe, the weights that learn as they were, and every batch."""
    found = {"batches": []}

    def watching(learn):
        def watched(recipe, *args):
            found["recipe"] = recipe
            found["before"] = {n: p.detach().clone() for n, p in learnt_weights(recipe.networks).items()}
            batch = recipe.batch

            def recorded(*args):
                made = batch(*args)
                ids = recipe.ids[made.prompt]
                found["batches"].append(theirs.ExampleBatch(made.x_0, made.noise, made.t, ids))
                return made

            recipe.batch = recorded
            found["networks"] = dict(recipe.networks)
            learn(recipe, *args)
            found["after"] = {n: p.detach() for n, p in recipe.networks.named_parameters() if n in found["before"]}

        return watched

    for module in (dreambooth, lora, textual_inversion):
        monkeypatch.setattr(module, "learn", watching(module.learn))
    return found


def with_loop(method, **fields):
    config = CONFIGS[method]
    return replace(config, loop=replace(LOOP, steps=STEPS, **fields))


def saved(tmp_path, sd, dtype) -> theirs.ExampleModels:
    """The same model as diffusers loads it."""
    save_checkpoint(sd.checkpoint, tmp_path / "theirs", layout="diffusers")
    return theirs.ExampleModels(tmp_path / "theirs", dtype)


def assert_same_losses(folder, done, rel):
    losses = [line["loss"] for line in read_log(folder / "log.jsonl")]
    assert len(losses) == len(done.losses) == STEPS
    assert losses == pytest.approx(done.losses, rel=rel, abs=1e-5)


def assert_same_changes(ours, done):
    """‖Δw - Δw_ref‖ / ‖Δw_ref‖ ≤ 1e-4 for every tensor."""
    assert ours.keys() == done.before.keys()
    for name, change in ours.items():
        expected = done.after[name] - done.before[name]
        if name.endswith("k_proj.bias"):  # shifts a query's scores alike: no gradient, Adam steps by its rounding
            continue
        assert expected.norm() > 0, name
        distance = ((change.view_as(expected) - expected).norm() / expected.norm()).item()
        assert distance <= 1e-4, (name, distance)


@pytest.mark.parametrize(("prediction", "text_encoder"), [("eps", False), ("v", True)])
def test_dreambooth_with_prior_moves_every_weight_as_diffusers_does(seen, tmp_path, prediction, text_encoder):
    sd = model(prediction, torch.float64)
    # diffusers clips both networks as one, minisd each by itself: with both of them neither is clipped
    clip = UNCLIPPED if text_encoder else 1.0
    config = replace(with_loop("dreambooth", clip=clip), text_encoder=text_encoder)
    config = replace(config, prior=replace(config.prior, weight=0.7))
    train("dreambooth", tmp_path / "ours", sd, config=config)
    example = theirs.dreambooth(
        saved(tmp_path, sd, torch.float64),
        lr=LOOP.lr,
        prior_loss_weight=0.7,
        max_grad_norm=clip,
        train_text_encoder=text_encoder,
    )
    done = example.run(seen["batches"])
    assert_same_losses(tmp_path / "ours", done, 1e-6)
    ours, moved = {}, {name: seen["after"][name] - before for name, before in seen["before"].items()}
    for name, place, dialect in (("unet", "unet", "diffusers"), ("text", "text_encoder", "hf")):
        own = {full.removeprefix(f"{name}."): change for full, change in moved.items() if full.startswith(name)}
        names = {n: source for n, source in keymap(seen["networks"][name], dialect).items() if n in own}
        ours |= {f"{place}.{key}".replace(".text_model.", "."): d for key, d in to_official(own, names).items()}
    assert not moved.get("text.projection.weight", torch.zeros(1)).any()  # takes no part; CLIPTextModel has none
    ours.pop("text_encoder.text_projection.weight", None)
    assert_same_changes(ours, done)


def test_dreambooth_has_diffusers_loss_in_float32(seen, tmp_path):
    sd = model("eps")
    train("dreambooth", tmp_path / "ours", sd, config=with_loop("dreambooth"))
    models = saved(tmp_path, sd, torch.float32)
    done = theirs.dreambooth(models, lr=LOOP.lr, prior_loss_weight=1.0, max_grad_norm=1.0).run(seen["batches"])
    assert_same_losses(tmp_path / "ours", done, 1e-5)


def test_textual_inversion_moves_its_rows_as_diffusers_does(seen, tmp_path):
    sd = model("v", torch.float64)
    train("textual inversion", tmp_path / "ours", sd, config=with_loop("textual inversion", clip=UNCLIPPED))
    (name,) = seen["before"]
    rows = seen["before"][name]
    done = theirs.textual_inversion(saved(tmp_path, sd, torch.float64), rows, lr=LOOP.lr).run(seen["batches"])
    assert_same_losses(tmp_path / "ours", done, 1e-6)
    assert_same_changes({"rows": seen["after"][name] - rows}, done)


def test_lora_moves_its_matrices_as_peft_does(seen, tmp_path):
    sd = model("eps", torch.float64)
    config = replace(with_loop("lora"), text=())
    train("lora", tmp_path / "ours", sd, config=config)
    names = names_to_official({"unet": sd.unet, "text": sd.text_encoder})

    def peft_name(ours: str) -> str:
        layer, _, leaf = ours.removesuffix(".weight").rpartition(".")
        return f"{names[layer][1]}.{ {'down': 'lora_A', 'up': 'lora_B'}[leaf] }.weight"

    example = theirs.lora(
        saved(tmp_path, sd, torch.float64),
        {peft_name(name): tensor for name, tensor in seen["before"].items()},
        rank=config.rank,
        alpha=config.alpha,
        target_modules=r".*(attn\d\.(to_[qkv]|to_out\.0)|\.conv1)",
        lr=LOOP.lr,
        prior_loss_weight=1.0,
        max_grad_norm=1.0,
    )
    done = example.run(seen["batches"])
    assert_same_losses(tmp_path / "ours", done, 1e-6)
    assert_same_changes({peft_name(name): seen["after"][name] - b for name, b in seen["before"].items()}, done)
