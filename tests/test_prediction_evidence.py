"""ε or v: every kind of evidence, in its order; named in the report, overridden by prediction=, stored when saving."""

import json

import pytest
import torch
from reference import manifest
from tiny import checkpoint, ldm_file, sparse_file

from minisd.checkpoints.files import CheckpointError, save_safetensors
from minisd.checkpoints.load import load_checkpoint, open_checkpoint
from minisd.checkpoints.save import save_checkpoint

PROBE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def sd2(tmp_path, *, std=None, name="model.safetensors", said=None):
    """A file of 2.x shapes: the same for 2-base (ε) and 2.1-v."""
    bias = {} if std is None else {PROBE: torch.linspace(-1, 1, 320) * std / torch.linspace(-1, 1, 320).std()}
    return sparse_file(tmp_path / name, manifest("sd-v2-1")["tensors"], metadata=said, values=bias)


def prediction(path, **options):
    opened = open_checkpoint(path, **options)
    return opened.prediction


@pytest.mark.parametrize(("std", "says"), [(0.2, "v"), (0.05, "eps")])
def test_the_std_of_one_bias_is_evidence(tmp_path, std, says):
    found, why = prediction(sd2(tmp_path, std=std))
    assert found == says
    assert "std 0." in why


@pytest.mark.parametrize(("step", "says"), [(875000, "eps"), (110000, "v")])
def test_the_global_step_outranks_the_bias(tmp_path, step, says):
    tensors = manifest("sd-v2-1")["tensors"]
    path = sd2(tmp_path, std=0.2 if says == "eps" else 0.01, said={"minisd_global_step": str(step)})
    assert len(tensors) == 1240
    assert prediction(path) == (says, f"global_step {step}")


@pytest.mark.parametrize(
    ("text", "says"), [('parameterization: "v"', "v"), ("parameterization: eps", "eps"), ("x: 1", "eps")]
)
def test_a_yaml_beside_the_file_outranks_both(tmp_path, text, says):
    path = sd2(tmp_path, std=0.2 if says == "eps" else 0.01, said={"minisd_global_step": "875000"})
    yaml = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    " + text
    (tmp_path / "model.yaml").write_text(yaml)
    found, why = prediction(path)
    assert found == says
    assert "model.yaml" in why


def test_a_yaml_of_another_model_in_the_folder_is_no_evidence(tmp_path):
    path = sd2(tmp_path, std=0.2)
    (tmp_path / "other.ckpt").write_bytes(b"")
    (tmp_path / "other.yaml").write_text("target: LatentDiffusion\nparameterization: eps")
    assert prediction(path)[0] == "v"


@pytest.mark.parametrize("place", ["scheduler_config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(("said", "says"), [("v_prediction", "v"), ("epsilon", "eps"), ("sample", "x_0")])
def test_a_scheduler_config_beside_the_file_outranks_the_bias(tmp_path, place, said, says):
    path = sd2(tmp_path, std=0.01 if says == "v" else 0.2)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(json.dumps({"prediction_type": said, "beta_schedule": "scaled_linear"}))
    found, why = prediction(path)
    assert found == says
    assert "scheduler_config.json" in why


def test_families_that_never_differ_need_no_other_evidence(tmp_path):
    for name, says in (("sd-v1", "eps"), ("sd-x4-upscaler", "v"), ("sd-v2-inpainting", "eps")):
        found, why = prediction(sparse_file(tmp_path / "a.safetensors", manifest(name)["tensors"]))
        assert (found, why.startswith("every official")) == (says, True)


def test_with_no_evidence_the_prediction_is_asked_for(tmp_path):
    """A folder without scheduler whose U-Net is of no official shape."""
    save_checkpoint(checkpoint("SD2_V"), tmp_path / "folder", layout="diffusers")
    (tmp_path / "folder" / "minisd_extra.safetensors").unlink()
    (tmp_path / "folder" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match='give prediction="eps" or "v"'):
        load_checkpoint(tmp_path / "folder")
    loaded = load_checkpoint(tmp_path / "folder", prediction="v")
    assert loaded.config.prediction == "v"
    assert "prediction: v (prediction= was given)" in loaded.report


def test_the_evidence_is_reported_overridden_and_stored(tmp_path):
    tensors, said = ldm_file("SD2_V")
    save_safetensors(tmp_path / "a.safetensors", tensors, said)
    assert "prediction: v (the test)" in load_checkpoint(tmp_path / "a.safetensors").report
    other = load_checkpoint(tmp_path / "a.safetensors", prediction="eps")
    save_checkpoint(other, tmp_path / "b.safetensors")
    again = load_checkpoint(tmp_path / "b.safetensors")
    assert (again.config.prediction, again.prediction_evidence) == ("eps", "prediction= was given, against v: the test")


def test_our_metadata_outrank_everything(tmp_path):
    tensors, said = ldm_file("SD2_V")
    save_safetensors(tmp_path / "a.safetensors", tensors, said | {"minisd_global_step": "875000"})
    (tmp_path / "a.yaml").write_text("target: LatentDiffusion\nparameterization: eps")
    assert load_checkpoint(tmp_path / "a.safetensors").config.prediction == "v"


@pytest.mark.parametrize("wrong", ["noise", "epsilon", 3])
def test_a_prediction_that_does_not_exist_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="allowed: eps, v, x_0"):
        load_checkpoint(tmp_path, prediction=wrong)
