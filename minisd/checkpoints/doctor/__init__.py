"""The checkpoint doctor: what a file is, what it holds, tensor by tensor, and what running it takes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch

from minisd.checkpoints.diffusers_layout import Tensors
from minisd.checkpoints.doctor.anatomy import describe, point_out_contradictions
from minisd.checkpoints.doctor.health import PROBE_THRESHOLD, examine, forward_probe
from minisd.checkpoints.doctor.inspection import Inspection, bytes_text
from minisd.checkpoints.doctor.kinds import Kind, image_kind, other_kind
from minisd.checkpoints.files import CheckpointError, TensorFile, flatten, open_tensors
from minisd.checkpoints.files.embedding_image import is_png, read_image
from minisd.checkpoints.load import load_network
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.opening import Opened, open_checkpoint


def inspect_checkpoint(path: str | os.PathLike, *, probe: bool = False, verify: bool = False) -> Inspection:
    """Examine a file or a diffusers folder; str() of the result is the page to print.

    Only names, shapes and a few scalars are read, unless verify=True (every tensor: checksums, NaN, Inf, empty weights)
    or probe=True (one forward of the U-Net in float32, which sides with eps or v). Nothing about the file raises: what
    is wrong with it stands in `.problems`, and `.ok` is False, for damaged files as for kinds that minisd does not run.
    """
    path = Path(path)
    try:
        if path.is_dir():
            inspection, files = _folder(path)
        else:
            file = open_tensors(path)
            inspection, files = _file(path, file), [file]
    except CheckpointError as error:
        return _unreadable(path, error)
    if verify:
        _verify(inspection, files)
    if probe:
        _probe(inspection, path)
    return inspection


def _file(path: Path, file: TensorFile) -> Inspection:
    inspection = Inspection(str(path), "", _size(path), file.format, tensors=len(file))
    try:
        if other := other_kind(file):
            _other(inspection, other, file)
        else:
            describe(inspection, open_checkpoint(path))
    except CheckpointError as error:
        inspection.problems.append(_bare(error, path))
    except (LookupError, ArithmeticError, ValueError, TypeError) as error:
        # shapes are unpacked by name: what is misshapen ends here
        inspection.problems.append(f"its tensors have the names of a known kind and impossible shapes ({error})")
    if not inspection.networks and not inspection.used:
        inspection.kind = inspection.kind or "tensors that minisd cannot make a network of"
        inspection.groups, inspection.unknown = _groups(file), []
        inspection.problems = inspection.problems or ["its tensors are those of no network that minisd knows"]
    if file.dropped:
        names = ", ".join(sorted(set(file.dropped)))
        inspection.notes.append(f"pickled objects were left out, nothing of them was run: {names}")
    _beside_state_dict(inspection, file)
    return inspection


def _other(inspection: Inspection, other: Kind, file: TensorFile) -> None:
    inspection.kind, inspection.family, inspection.facts = other.kind, other.base, other.facts
    inspection.needs, inspection.problems = other.needs, other.problems
    inspection.used, inspection.unknown = len(other.used), [name for name in file if name not in other.used]


def _folder(path: Path) -> tuple[Inspection, list[TensorFile]]:
    opened = open_checkpoint(path)
    inspection = Inspection(str(path), "", sum(_size(Path(f.path)) for f in opened.files), "diffusers folder")
    inspection.tensors = sum(map(len, opened.files))
    describe(inspection, opened)
    inspection.notes += opened.notes
    _folder_files(inspection, opened)
    return inspection, opened.files


def _unreadable(path: Path, error: CheckpointError) -> Inspection:
    inspection = Inspection(str(path), "cannot be read as a checkpoint", _size(path), problems=[_bare(error, path)])
    if is_png(path):
        _image(inspection)
    if path.is_dir():
        inside = sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"))
        inspection.needs += [f"one of the files in it: {_few(inside)}"] if inside else []
    return inspection


def _image(inspection: Inspection) -> None:
    """A PNG: perhaps one of A1111's that carry an embedding."""
    try:
        name, vectors = read_image(inspection.path)
    except CheckpointError as error:
        if "carries no embedding" not in str(error):
            inspection.problems.append(_bare(error, Path(inspection.path)))
        return
    kind = image_kind(Path(inspection.path), name, tuple(vectors.shape))
    inspection.kind, inspection.family, inspection.facts = kind.kind, kind.base, kind.facts
    inspection.needs, inspection.problems = kind.needs, kind.problems
    if not vectors.isfinite().all():
        inspection.problems.append("its vectors hold values that are not finite (NaN, Inf)")


def _bare(error: Exception, path: Path) -> str:
    """The message without the path in front, with which the page begins."""
    return str(error).removeprefix(f"{path}").removeprefix(":").strip()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f", … and {len(names) - 5} more" if len(names) > 5 else "")


# --------------------------------------------------------------------------------------- what else lies in and about it


def _groups(file: TensorFile) -> dict[str, tuple[int, int]]:
    """Tensors and elements by the first level of their names."""
    tensors, elements = Counter(), Counter()
    for name in file:
        group = name.partition(".")[0]
        tensors[group] += 1
        elements[group] += prod(file.shape(name))
    return {group: (count, elements[group]) for group, count in tensors.most_common()}


def _beside_state_dict(inspection: Inspection, file: TensorFile) -> None:
    """Tensors that a training file keeps next to its state_dict: they are never read."""
    if not isinstance(file.tree, dict) or not isinstance(file.tree.get("state_dict"), dict):
        return
    for key, tree in file.tree.items():
        entries = [entry for _, entry in flatten(tree, "")] if key != "state_dict" else []
        if entries:
            size = bytes_text(sum(entry.nbytes for entry in entries))
            inspection.notes.append(f"{key}, beside state_dict, holds {len(entries):,} tensors ({size}): never read")


def _folder_files(inspection: Inspection, opened: Opened) -> None:
    """The files that each component was read from, those that lie beside unused, and the parts that are missing."""
    read = {Path(file.path) for file in opened.files}
    for network, part in opened.contents.parts.items():
        tensors, title = part.tensors.file, NETWORKS[network].title
        files = {Path(file.path) for file in tensors.files.values()} if isinstance(tensors, Tensors) else set()
        names = sorted(str(file.relative_to(opened.path)) for file in files)
        inspection.facts[title] = ", ".join(names) if len(names) < 3 else f"{names[0]} … ({len(names)} shards)"
        beside = {f for file in files for f in file.parent.iterdir() if f.suffix in (".safetensors", ".bin", ".ckpt")}
        if unused := sorted(str(file.relative_to(opened.path)) for file in beside - read):
            inspection.notes.append(f"not read, another file of the {title} comes first: {_few(unused)}")
    optional = {
        "scheduler": "the noise schedule is then SD's own, and eps or v told otherwise",
        "tokenizer": "CLIP's own comes with minisd",
    }
    if (opened.path / NETWORKS["unet"].subfolder).is_dir():
        missing = [name for name in optional if not (opened.path / name).is_dir()]
        inspection.notes += [f"{name}/ is missing, which is no harm: {optional[name]}" for name in missing]


# ---------------------------------------------------------------------------------------------------- verify=, probe=


def _verify(inspection: Inspection, files: Iterable[TensorFile]) -> None:
    health = examine(files)
    inspection.problems += health.damage
    if health.checksums:
        inspection.facts["checksums"] = "match" + (
            f" in {health.checksums} of {health.files} files" if health.files > 1 else ""
        )
    elif not health.damage:
        inspection.facts["checksums"] = "none in it (torch's zip files have them, and what minisd saves)"
    for what, tensors in (("NaN", health.nan), ("Inf", health.inf)):
        if tensors:
            named = _few(f"{name} ({count:,})" for name, count in tensors.items())
            inspection.problems.append(f"{len(tensors)} tensors hold {what}: {named}")
    if not health.nan and not health.inf:
        inspection.facts["values"] = f"all {health.tensors:,} tensors were read: no NaN, no Inf"
    if health.zero:
        inspection.notes.append(
            f"{len(health.zero)} weights hold nothing but 0, an untrained layer? {_few(health.zero)}"
        )


def _probe(inspection: Inspection, path: Path) -> None:
    if NETWORKS["unet"].title not in {network.name for network in inspection.networks if not network.problem}:
        inspection.notes.append("there is no U-Net to probe")
        return
    try:
        mean = forward_probe(load_network(path, "unet", cast=lambda dtype: torch.float32))
    except CheckpointError as error:
        inspection.notes.append(f"the U-Net could not be probed: {_bare(error, path)}")
        return
    probed = "v" if mean < PROBE_THRESHOLD else "eps"
    because = f"forward probe, mean(out - x) = {mean:.3f} (v where below {PROBE_THRESHOLD:g}; calibrated on SD 2.x)"
    inspection.evidence.append((probed, because))
    against = "" if inspection.prediction in (None, probed) else f", CONTRADICTS {inspection.prediction}"
    inspection.facts["probe"] = f"{probed}: {because}{against}"
    if inspection.prediction is None:
        inspection.notes.append(f'the probe speaks for prediction="{probed}"; loading does not run it: give it there')
    point_out_contradictions(inspection)
