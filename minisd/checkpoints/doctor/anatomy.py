"""The networks of an opened checkpoint, described: whole or not, every tensor's place, eps or v, what running takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from minisd.checkpoints.building import build
from minisd.checkpoints.detect import Part
from minisd.checkpoints.diffusers_layout import EXTRA
from minisd.checkpoints.doctor.inspection import Inspection, Network, bytes_text
from minisd.checkpoints.evidence import evidence_of
from minisd.checkpoints.families import presets_of
from minisd.checkpoints.files import CheckpointError
from minisd.checkpoints.load import foreign_tensors
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.networks.format import Renamed
from minisd.checkpoints.opening import Opened
from minisd.config import PRESETS, CLIPTextConfig, ModelConfig, UNetConfig

EMA = "model_ema.diffusion_model"
CONTRADICTION = "the evidence for eps or v contradicts itself"


def describe(inspection: Inspection, opened: Opened) -> None:
    """Fill in all that the opened networks tell."""
    parts = opened.contents.parts
    inspection.kind = "a Stable Diffusion checkpoint" if {"unet", "vae", "text"} <= set(parts) else opened.contents.kind
    if {"unet", "control"} <= set(parts):
        inspection.kind += " with a ControlNet"
    if opened.layout == "ldm" and parts:
        inspection.format += ", " + _layout({part.dialect for part in parts.values()})
    for name in NETWORKS:
        if name in parts:
            network = _network(name, parts[name], opened)
            inspection.networks.append(network)
            inspection.problems += [f"{network.name}: {network.problem}"] if network.problem else []
    _account(inspection, opened)
    if "unet" in parts:
        _prediction(inspection, opened)
        _ema(inspection, opened)
        inspection.facts["input"] = _inputs(parts["unet"].config)
    if opened.global_step is not None:
        inspection.facts["global step"] = f"{opened.global_step:,}"
    if "text" in parts:
        _tokens(inspection, parts["text"].config, opened)
    _family(inspection, opened)
    _needs(inspection, opened)


def _layout(dialects: set[str]) -> str:
    if dialects & {"ldm", "openclip"}:
        return "original layout"
    return "diffusers names" if "diffusers" in dialects else "Hugging Face names"


class Outline(Renamed):
    """A part's tensors without their values: what is built from them is checked as in loading, and nothing is read."""

    def __init__(self, tensors: Renamed):
        super().__init__(tensors.file, tensors.names)

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")


def _network(name: str, part: Part, opened: Opened) -> Network:
    """A network that cannot be built keeps the count of the file's elements for that of its parameters."""
    tensors, dtypes, stored = part.tensors, Counter(), 0
    for key in tensors:
        count = prod(tensors.shape(key))
        dtypes[str(tensors.dtype(key)).removeprefix("torch.")] += count
        stored += count * tensors.dtype(key).itemsize
    declared = NETWORKS[name]
    about = declared.about(part.config)
    network = Network(declared.title, about, len(tensors), dtypes.total(), dict(dtypes.most_common()), stored)
    rest = Outline(opened.text_rest) if name == "text" and opened.text_rest is not None else None
    try:
        built = build(name, replace(part, tensors=Outline(tensors), doubt=""), device="meta", rest=rest)
        network.parameters = sum(parameter.numel() for parameter in built.parameters())
    except CheckpointError as error:
        network.problem = str(error).removeprefix(":").strip()
    return network


def _account(inspection: Inspection, opened: Opened) -> None:
    """Every tensor of every file: used by a network, known and not run, or unknown."""
    contents = opened.contents
    inspection.used = sum(len(part.tensors) for part in contents.parts.values())
    inspection.known = {reason: list(names) for reason, names in contents.known.items()}
    inspection.unknown = list(contents.unknown)
    placed = {name for names in inspection.known.values() for name in names}
    rest = opened.text_rest.names.values() if opened.text_rest is not None else ()
    inspection.used += sum(f"{EXTRA}/{name}" not in placed for name in rest)
    if opened.layout == "diffusers" and not rest:  # the folder of unCLIP's normaliser
        inspection.known |= {"unCLIP embedding statistics": list(opened.extras)} if opened.extras else {}
    if foreign := foreign_tensors(contents):
        count = f"{len(foreign)} tensors in its networks are not Stable Diffusion's"
        inspection.problems.append(f"{count}, so that loading refuses the file; the first is {foreign[0]}")


def _prediction(inspection: Inspection, opened: Opened) -> None:
    prediction, because = opened.prediction
    more = evidence_of(opened.contents, opened.path, opened.global_step, opened.metadata)
    inspection.prediction = prediction
    inspection.evidence = [(prediction, because)] if prediction else []
    inspection.evidence += [item for item in more if item not in inspection.evidence]
    if prediction is None:
        inspection.facts["prediction"] = f"eps or v? Nothing tells: {because}"
        return
    inspection.facts["prediction"] = (
        f'{prediction}: {because}; prediction="{"v" if prediction == "eps" else "eps"}" overrides it'
    )
    for i, (other, why) in enumerate(inspection.evidence[1:], 2):
        inspection.facts[f"evidence {i}"] = f"{other}: {why}" + (
            "" if other == prediction else f", CONTRADICTS {prediction}"
        )
    point_out_contradictions(inspection)


def point_out_contradictions(inspection: Inspection) -> None:
    inspection.notes = [note for note in inspection.notes if not note.startswith(CONTRADICTION)]
    others = sorted({prediction for prediction, _ in inspection.evidence} - {inspection.prediction})
    if inspection.prediction is not None and others:
        inspection.notes.append(
            f"{CONTRADICTION}: loading takes {inspection.prediction}. Where pictures come out as noise or grey, give "
            f'prediction="{others[0]}"'
        )


def _ema(inspection: Inspection, opened: Opened) -> None:
    inspection.ema_tensors = sum(name.startswith(EMA) for name in opened.extras)
    if not inspection.ema_tensors:
        counters = any(name.startswith("model_ema.") for name in opened.extras)
        pruned = " (the EMA's counters are left: its values then usually stand under the ordinary names)"
        inspection.facts["weights"] = "one set, no separate EMA copy" + (pruned if counters else "")
        return
    inspection.facts["weights"] = (
        f'two sets: a plain load takes the raw ones, weights="ema" the EMA copy ({inspection.ema_tensors} tensors)'
    )
    names = [EMA + name.replace(".", "") for name in opened.contents.parts["unet"].tensors]
    if lost := [name for name in names if name not in opened.extras]:
        inspection.notes.append(
            f'weights="ema" will be refused: {len(lost)} tensors of the EMA are missing, first: {lost[0]}'
        )


def _inputs(unet: UNetConfig) -> str:
    kinds = {
        5: "latents and a depth map",
        7: "latents and the low-resolution picture",
        8: "latents and those of the picture to edit",
        9: "latents, the mask and the masked picture's latents",
    }
    others = "latents" if unet.in_channels == unet.out_channels else "latents and others"
    y = "; y is a noise level" if unet.num_classes else "; y is an image embedding" if unet.vector_dim else ""
    return f"{unet.in_channels} channels: {kinds.get(unet.in_channels, others)}{y}"


def _tokens(inspection: Inspection, text: CLIPTextConfig, opened: Opened) -> None:
    names = ", ".join(f"{token} ({len(ids)} vectors)" for token, ids in opened.added_tokens.items())
    more = text.vocab_size - CLIPTextConfig.vocab_size
    if names or more > 0:
        inspection.facts["tokens"] = names or f"{more} beyond CLIP's {CLIPTextConfig.vocab_size:,}, without their names"
    for rows in getattr(opened.contents.parts["text"].tensors.file, "stored_rows", {}).values():
        inspection.facts["vocabulary"] = (
            f"{rows:,} different rows for {text.vocab_size:,} tokens: the file stores each once, and is smaller than "
            "the networks below"
        )


def _family(inspection: Inspection, opened: Opened) -> None:
    parts = opened.contents.parts
    unet = parts["unet"].config if "unet" in parts else parts["control"].config.unet if "control" in parts else None
    if unet is not None:
        same = presets_of(unet)
        inspection.presets = [name for name in same if same[name].prediction == inspection.prediction] or list(same)
        inspection.family = " or ".join(same[name].name for name in inspection.presets)
        if opened.config is not None and opened.config.name not in ("custom", ModelConfig.name):
            inspection.family = opened.config.name
        inspection.family = inspection.family or "custom: no official U-Net has these shapes"
    elif "text" in parts:
        inspection.family = {768: PRESETS["SD1"].name, 1024: "Stable Diffusion 2.x"}.get(parts["text"].config.width, "")
    elif "vae" in parts and parts["vae"].config.factor == 4:
        inspection.family = PRESETS["SD_X4_UPSCALER"].name
    elif "vae" in parts:
        inspection.family = "Stable Diffusion 1.x and 2.x, all but the x4 upscaler"
        inspection.notes.append(
            "SDXL's VAE has the same shapes and other latents: wrong colours mean that it is that one"
        )


def _needs(inspection: Inspection, opened: Opened) -> None:
    parts, name = opened.contents.parts, opened.path.name
    for doubt in sorted({part.doubt for part in parts.values() if part.doubt}):
        inspection.needs.append(f"{doubt}: a diffusers folder's config.json says it, as does a file saved by minisd")
    if "unet" in parts:
        if "vae" not in parts:
            inspection.needs.append(f"a VAE: minisd.load({name!r}, vae=FILE)")
        if "text" not in parts:
            inspection.needs.append(
                "a text encoder, which minisd takes from the checkpoint's own file or folder: put the networks side by "
                "side into one diffusers folder (unet/, vae/, text_encoder/)"
            )
        if inspection.prediction is None:
            inspection.needs.append('prediction="eps" or prediction="v", as its author says; both can be tried')
        _how_to_run(inspection, parts["unet"].config, opened)
    elif "vae" in parts:
        inspection.needs.append(f"a checkpoint whose VAE it replaces: minisd.load(CHECKPOINT, vae={name!r})")
    elif parts and "control" not in parts:
        inspection.needs.append("a U-Net and a VAE: it is one part of a checkpoint")
    if "control" in parts:
        base = "" if "unet" in parts else f"a checkpoint of {inspection.family} for it to steer, and "
        inspection.needs.append(f"{base}minisd.load_controlnet({name!r})")


def _how_to_run(inspection: Inspection, unet: UNetConfig, opened: Opened) -> None:
    if {"vae", "text"} <= set(opened.contents.parts) and inspection.ok:
        command = {4: "txt2img", 9: "inpaint"}.get(unet.in_channels)
        if command and unet.vector_dim is None:
            start = "" if inspection.needs else "nothing else: "
            inspection.needs.append(f'{start}minisd {command} "a red apple" --checkpoint {opened.path}')
        else:
            inspection.needs.append("its further inputs, given to the U-Net in a Conditioning (concat=, y=)")
    run = [network for network in inspection.networks if network.name != NETWORKS["control"].title]
    stored, floats = sum(network.stored for network in run), 4 * sum(network.parameters for network in run)
    inspection.needs.append(
        f"memory for the weights: {bytes_text(stored)} as they are stored, {bytes_text(floats)} in float32; "
        "activations come on top"
    )
