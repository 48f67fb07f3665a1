"""The training loop: one result, whatever happens on the way."""

import errno
import json
import os
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_network
from torch import nn
from training_tiny import DDPM, LOOP, RUN, UNET, pictures, train_recipe

from minisd.checkpoints.files import open_tensors
from minisd.models.unet import Conditioning
from minisd.runtime.optimize import optimize
from minisd.training.draws import Draws, examples
from minisd.training.ema import EMA
from minisd.training.loop import Diverged, learning_rate
from minisd.training.optimizers import Muon, build_optimizers, orthogonalized
from minisd.training.options import LoopConfig, changed, read_changes
from minisd.training.parallel import ALONE, Processes
from minisd.training.progress import read_log
from minisd.training.recipes.ddpm import DDPMRecipe, train_ddpm
from minisd.training.state import differing
from minisd.training.weights import checkpoint_gradients

HERE = Path(__file__).parent
LDM = np.load(HERE / "data" / "training_ldm.npz")
STATE = "state.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the tiny DDPM was trained without interruption."""
    folder = tmp_path_factory.mktemp("finished")
    train_recipe("ddpm", folder)
    return folder


def run_script(*arguments, processes: int | None = None):
    launcher = (
        [] if processes is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    command = [sys.executable, *launcher, str(HERE / "training_tiny.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    file = open_tensors(folder / STATE)
    return {name: file.read(name) for name in file}


def bits_of(folder: Path) -> bytes:
    return (folder / STATE).read_bytes()


# ------------------------------------------------------------------------------------------------- resuming


def test_a_training_killed_again_and_again_ends_with_the_bits_of_one_that_was_not(finished, tmp_path):
    # in the first step, between states, in a step that was run before, while a state is written, after the last one
    run_script("killed", tmp_path, 0, 4, 4, "rename", 7, 9)
    assert bits_of(tmp_path) == bits_of(finished)
    assert (tmp_path / "ddpm.safetensors").read_bytes() == (finished / "ddpm.safetensors").read_bytes()


def test_ctrl_c_ends_the_step_and_saves_it_and_the_training_goes_on_from_there(finished, tmp_path, monkeypatch):
    loss, before = DDPMRecipe.loss, signal.getsignal(signal.SIGINT)

    def interrupted(self, examples, draws):
        if draws.step == 4:
            signal.raise_signal(signal.SIGINT)
        return loss(self, examples, draws)

    monkeypatch.setattr(DDPMRecipe, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt, match="holds 5 of 10 steps; the same command goes on"):
        train_recipe("ddpm", tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    train_recipe("ddpm", tmp_path)
    assert bits_of(tmp_path) == bits_of(finished)


def test_the_log_of_a_resumed_training_has_every_line_once(finished, tmp_path, monkeypatch):
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train_recipe("ddpm", tmp_path)
    monkeypatch.undo()
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4, "los')  # as a crash may leave it
    train_recipe("ddpm", tmp_path)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4, 6, 8, 10]
    assert read_log(tmp_path / "log.jsonl")[-1]["loss"] == read_log(finished / "log.jsonl")[-1]["loss"]


def test_a_finished_training_is_loaded_and_not_trained_on(finished, monkeypatch):
    stop_at(monkeypatch, 0)
    before = bits_of(finished)
    model = train_recipe("ddpm", finished)
    averages = tensors_of(finished)["averages.unet.conv_in.weight"]
    assert torch.equal(model.unet.conv_in.weight, averages)
    assert bits_of(finished) == before


def test_a_state_of_another_config_is_refused_with_the_difference(finished):
    config = replace(DDPM, loop=replace(LOOP, lr=2e-3, batch_size=4))
    with pytest.raises(
        ValueError, match=r"recipe\.loop\.batch_size was 8, is 4; recipe\.loop\.lr was 0\.001, is 0\.002"
    ):
        train_ddpm(pictures(), finished, config, RUN)


def test_a_state_of_other_pictures_is_refused(finished):
    with pytest.raises(ValueError, match='data was "discs 11 16", is "discs 12 16"'):
        train_ddpm(pictures(12), finished, DDPM, RUN)


def test_a_file_that_is_no_state_is_refused(finished, tmp_path):
    (tmp_path / STATE).write_bytes((finished / "ddpm.safetensors").read_bytes())
    with pytest.raises(ValueError, match="no state of a training"):
        train_recipe("ddpm", tmp_path)


def test_a_full_disk_stops_the_training_and_costs_the_steps_since_the_last_state(finished, tmp_path, monkeypatch):
    fill_disk_at_state(monkeypatch, 2)
    with pytest.raises(OSError, match="No space left"):
        train_recipe("ddpm", tmp_path)
    monkeypatch.undo()
    assert json.loads(open_tensors(tmp_path / STATE).metadata["minisd_training"])["step"] == 3
    assert not list(tmp_path.glob(".*.tmp"))
    train_recipe("ddpm", tmp_path)
    assert bits_of(tmp_path) == bits_of(finished)


def stop_at(monkeypatch, step: int) -> None:
    loss = DDPMRecipe.loss

    def stopping(self, chosen, draws):
        if draws.step == step:
            raise KeyboardInterrupt
        return loss(self, chosen, draws)

    monkeypatch.setattr(DDPMRecipe, "loss", stopping)


def fill_disk_at_state(monkeypatch, number: int) -> None:
    synced = []

    def fsync(descriptor):
        if STATE in os.readlink(f"/proc/self/fd/{descriptor}"):
            synced.append(descriptor)
        if len(synced) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fsync)


# ---------------------------------------------------------------------------------- micro-batches and processes


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory):
    """A folder in which torchrun trained several recipes, each into a folder of its name."""
    folder = tmp_path_factory.mktemp("two")
    run_script("train", folder, "ddpm", "muon", "muon-steps", "unet", "clip", "vae", processes=2)
    return folder


@pytest.mark.parametrize("recipe", ["ddpm", "muon", "unet", "clip", "vae"])
def test_two_processes_give_the_weights_of_one_with_the_same_whole_batch(recipe, by_two_processes, tmp_path):
    train_recipe(recipe, tmp_path)
    assert_same_to_rounding(tensors_of(by_two_processes / recipe), tensors_of(tmp_path))


def test_two_processes_that_share_muons_work_get_the_bits_of_one(by_two_processes, tmp_path):
    train_recipe("muon-steps", tmp_path)
    assert bits_of(by_two_processes / "muon-steps") == bits_of(tmp_path)


def test_micro_batches_give_the_weights_of_the_whole_batch(finished, tmp_path):
    config = replace(DDPM, loop=replace(LOOP, gradient_accumulation=4))
    train_ddpm(pictures(), tmp_path, config, RUN)
    assert_same_to_rounding(tensors_of(tmp_path), tensors_of(finished))


# A bias of the keys shifts a query's scores alike and has no gradient; Adam makes whole steps of its rounding.
ROUNDING_ALONE = ("to_k.bias", "attn_1.k.bias")


def assert_same_to_rounding(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(ROUNDING_ALONE):
            continue
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(
        ValueError, match=r"batch_size 10 .* 2 process\(es\) × gradient_accumulation 4 .* multiple of 8"
    ):
        Processes(0, 2).check(10, 4)


def test_processes_and_micro_batches_share_the_rows_of_a_batch():
    shares = [Processes(rank, 2).rows(12, part, 3) for rank in range(2) for part in range(3)]
    assert [row for share in shares for row in range(12)[share]] == list(range(12))


def test_recomputing_activations_changes_no_gradient_and_no_name():
    a, b = (deepcopy(random_network("unet", UNET)).requires_grad_(True) for _ in range(2))
    checkpoint_gradients(b.slots())
    x, context = torch.linspace(-1, 1, 2 * 4 * 64).view(2, 4, 8, 8), torch.linspace(-1, 1, 2 * 3 * 16).view(2, 3, 16)
    for unet in (a, b):
        unet(x, 5, Conditioning(context)).square().mean().backward()
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------- divergence


def test_a_nan_stops_the_training_and_names_the_step_and_the_first_layer(tmp_path, monkeypatch):
    spoil_at(monkeypatch, 5, "down.0.res.conv1")
    with pytest.raises(Diverged, match=r"ddpm diverged at step 5: .*first in the layer unet\.down\.0\.res\.conv1"):
        train_recipe("ddpm", tmp_path)
    state = open_tensors(tmp_path / STATE)
    assert json.loads(state.metadata["minisd_training"])["step"] == 3
    assert all(state[name].isfinite().all() for name in state)


def test_an_infinite_gradient_is_named_by_its_parameter(tmp_path, monkeypatch):
    loss = DDPMRecipe.loss

    def steep(self, chosen, draws):
        found = loss(self, chosen, draws)
        weight = self.model.unet.conv_out.bias.sum()
        return found | {"loss": found["loss"] + (weight - weight.detach()).abs().sqrt()}  # 0, with an infinite slope

    monkeypatch.setattr(DDPMRecipe, "loss", steep)
    with pytest.raises(Diverged, match=r"at step 0: gradient = nan, first in the gradient of unet\.conv_out\.bias"):
        train_recipe("ddpm", tmp_path)


def spoil_at(monkeypatch, step: int, layer: str) -> None:
    loss = DDPMRecipe.loss

    def spoiling(self, chosen, draws):
        if draws.step == step:
            with torch.no_grad():
                self.model.unet.get_submodule(layer).bias[0] = float("nan")
        return loss(self, chosen, draws)

    monkeypatch.setattr(DDPMRecipe, "loss", spoiling)


# ------------------------------------------------------------------------------------------------------- parts


def test_ema_follows_compvis_with_its_warm_up():
    weights = torch.from_numpy(LDM["ema_w"])
    network = nn.Linear(3, 2, bias=False)
    network.weight.data.copy_(weights[0])
    ema = EMA(network, 0.9999)
    for n, expected in enumerate(LDM["out_ema"], start=1):
        network.weight.data.copy_(weights[n])
        ema.update(n)
        torch.testing.assert_close(ema.averages["weight"], torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_averages_are_in_the_networks_for_as_long_as_they_are_applied():
    network = nn.Linear(2, 2)
    ema, before = EMA(network, 0.5), network.weight.detach().clone()
    network.weight.data.add_(1)
    with ema.applied():
        assert torch.equal(network.weight, before)
    assert torch.equal(network.weight, before + 1)


def test_every_pass_over_the_data_shows_each_example_once():
    seen = torch.cat([examples(0, step, 4, 6) for step in range(9)])
    passes = seen.view(-1, 6)
    assert all(sorted(order.tolist()) == list(range(6)) for order in passes)
    assert len({tuple(order.tolist()) for order in passes}) > 1


def test_a_row_has_the_same_numbers_in_whatever_part_it_is_computed():
    def drawn(rows):
        draws = Draws(3, 7, 8, rows)
        return draws.normal(2, 3), draws.uniform(1, 2), draws.integers(50)

    whole, parts = drawn(slice(0, 8)), [drawn(slice(i, i + 2)) for i in (0, 2, 4, 6)]
    for n, numbers in enumerate(whole):
        assert torch.equal(numbers, torch.cat([part[n] for part in parts]))
    assert not torch.equal(Draws(3, 7, 8, slice(0, 8)).normal(2), Draws(3, 8, 8, slice(0, 8)).normal(2))


def test_the_rate_rises_over_the_warm_up_and_falls_along_half_a_cosine():
    config = LoopConfig(steps=110, warmup=10, lr=2.0, decay="cosine")
    rates = [learning_rate(config, step) for step in (0, 4, 9, 10, 60, 109)]
    assert rates == pytest.approx([0.2, 1.0, 2.0, 2.0, 1.0, 2 * 0.5 * (1 + np.cos(np.pi * 0.99))], abs=1e-12)
    assert learning_rate(replace(config, decay="constant"), 109) == 2.0


def test_every_cycle_has_the_rates_of_a_training_of_its_own():
    once = LoopConfig(steps=110, warmup=10, decay="cosine", lr=2.0)
    thrice = replace(once, steps=330, cycles=3)
    assert [learning_rate(thrice, step) for step in range(330)] == [
        learning_rate(once, step) for step in range(110)
    ] * 3
    with pytest.raises(ValueError, match="330 steps in 4 cycles"):
        replace(thrice, cycles=4)


def test_weight_decay_shrinks_matrices_only():
    networks = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Embedding(4, 2), "c": nn.GroupNorm(1, 2)})
    (adamw,) = build_optimizers(networks, LoopConfig(weight_decay=0.1))
    shrunk, others = adamw.param_groups
    assert [p.shape for p in shrunk["params"]] == [(3, 2)]
    assert (shrunk["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(others["params"]) == 4


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 50), (1, 9), (64, 3)])
def test_orthogonalising_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.linspace(1, 0.1, len(vt))
    found = u.T @ orthogonalized(u @ torch.diag(100 * values) @ vt) @ vt.T
    assert (found - torch.diag(found.diagonal())).abs().max() < 1e-4
    assert 0.65 < found.diagonal().min() <= found.diagonal().max() < 1.25


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="in PyTorch since 2.9, for matrices")
@pytest.mark.parametrize("shape", [(12, 16), (30, 8), (8, 30)])
def test_muon_moves_matrices_as_pytorchs_does_and_kernels_as_their_matrices(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    matrix = nn.Parameter(start.clone())
    theirs, kernel = nn.Parameter(matrix.detach().clone()), nn.Parameter(matrix.detach().clone()[:, :, None, None])
    optimizers = [Muon([each], lr=0.02, weight_decay=0.1) for each in (matrix, kernel)]
    optimizers.append(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1))
    for _ in range(4):
        matrix.grad = torch.randn(shape, generator=generator)
        theirs.grad, kernel.grad = matrix.grad.clone(), matrix.grad.clone()[:, :, None, None]
        for optimizer in optimizers:
            optimizer.step()
    assert (matrix - theirs).norm() < 0.03 * (theirs - start).norm()  # theirs orthogonalises in bfloat16
    assert torch.equal(kernel[:, :, 0, 0], matrix)


def test_a_training_by_muon_moves_the_rest_by_adamw_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    config = replace(DDPM, loop=replace(LOOP, muon=0.02))
    muon, adamw = build_optimizers(DDPMRecipe(pictures(), config).networks, config.loop)
    assert all(p.ndim > 1 for group in muon.param_groups for p in group["params"])
    assert all(p.ndim == 1 for group in adamw.param_groups for p in group["params"])
    train_ddpm(pictures(), tmp_path / "whole", config, RUN)
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        train_ddpm(pictures(), tmp_path / "stopped", config, RUN)
    monkeypatch.undo()
    train_ddpm(pictures(), tmp_path / "stopped", config, RUN)
    assert bits_of(tmp_path / "stopped") == bits_of(tmp_path / "whole")
    read_back = open_tensors(tmp_path / "whole" / STATE)
    assert {name.split(".")[1] for name in read_back if name.startswith("optimizer.")} == {
        "momentum",
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    with pytest.raises(ValueError, match=r"muon=0\.0, .*all of them are above 0"):
        replace(LOOP, muon=0.0)


def test_training_leaves_the_global_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    train_recipe("ddpm", tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_tells_what_was_trained(finished):
    assert json.loads((finished / "config.json").read_text())["recipe"] == json.loads(json.dumps(asdict(DDPM)))
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "curves.png", "ddpm.safetensors", "log.jsonl", "samples-0000010.png", STATE
    }  # fmt: skip


def test_without_matplotlib_the_curves_are_missing_and_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.warns(UserWarning, match="no curves are drawn: they need matplotlib"):
        train_recipe("ddpm", tmp_path)
    assert not (tmp_path / "curves.png").exists()
    assert (tmp_path / "samples-0000010.png").exists()


def test_sheets_on_the_way_change_no_bit_of_the_result(tmp_path, monkeypatch):
    train_recipe("unet", tmp_path / "none")
    monkeypatch.setattr("training_tiny.RUN", replace(RUN, sample_every=4))  # each lays the weights out for sampling
    train_recipe("unet", tmp_path / "some")
    assert len(list((tmp_path / "some").glob("samples-*.png"))) == 3
    assert bits_of(tmp_path / "some") == bits_of(tmp_path / "none")


def test_tensorboard_gets_the_log_and_the_sheets(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_ddpm(pictures(), tmp_path, DDPM, replace(RUN, tensorboard=True))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = [line["loss"] for line in read_log(tmp_path / "log.jsonl")]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(logged)
    assert [event.step for event in found.Images("samples")] == [10]


def test_without_tensorboard_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'minisd\[tensorboard\]'"):
        train_ddpm(pictures(), tmp_path, DDPM, replace(RUN, tensorboard=True))


def test_differences_are_named_by_their_path():
    old, new = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}, {"a": {"b": 2, "c": [1, 2]}, "e": 0.5}
    assert differing(old, new) == ["a.b was 1, is 2", 'd was "x", is absent', "e was absent, is 0.5"]


def test_alone_is_a_group_of_one():
    x = torch.ones(2, 3, requires_grad=True)
    assert ALONE.gather(x) is x
    assert ALONE.is_first


# -------------------------------------------------------------------------------------------------- options


def test_a_config_is_changed_by_what_differs_only(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"loop": {"steps": 7, "lr": 1}, "size": 32}')
    config = changed(DDPM, read_changes(file, ["loop.steps=9", "schedule.kind=cosine"]))
    assert config == replace(
        DDPM, size=32, loop=replace(DDPM.loop, steps=9, lr=1.0), schedule=replace(DDPM.schedule, kind="cosine")
    )
    assert changed(config, json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["loop.step=9"], "LoopConfig has no field 'step'; known: .*steps"),
        (["loop.steps=many"], "LoopConfig.steps must be int, got 'many'"),
        (["loop=9"], "LoopConfig must be an object, got 9"),
        (["steps"], "'steps' sets nothing: give FIELD=VALUE"),
        (["loop..steps=1"], "'loop..steps=1' sets nothing"),
    ],
)
def test_a_change_that_changes_nothing_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        changed(DDPM, read_changes(None, settings))


def test_group_norms_that_train_in_bfloat16_on_a_cpu_are_taken_in_float32():
    norm = nn.Sequential(nn.GroupNorm(2, 4))
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = nn.functional.group_norm(x.float(), 2, norm[0].weight, norm[0].bias).bfloat16()
    optimize(norm)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), expected)
        with torch.no_grad():  # drawing stays as it was
            assert torch.equal(norm(x), nn.functional.group_norm(x, 2, norm[0].weight, norm[0].bias))
