"""The checkpoint doctor: what a file is, what it holds, tensor by tensor, and what running it takes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch

from minisd.adapters.embedding_picture import is_png, read_picture
from minisd.checkpoints.diffusers_layout import SUBFOLDERS, Tensors
from minisd.checkpoints.doctor.anatomy import TITLES, describe, point_out_contradictions
from minisd.checkpoints.doctor.health import PROBE_THRESHOLD, examine, forward_probe
from minisd.checkpoints.doctor.inspection import Inspection, bytes_text
from minisd.checkpoints.doctor.kinds import Kind, other_kind, picture_kind
from minisd.checkpoints.files import CheckpointError, TensorFile, flatten, open_tensors
from minisd.checkpoints.load import load_network
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
            found, files = _folder(path)
        else:
            file = open_tensors(path)
            found, files = _file(path, file), [file]
    except CheckpointError as error:
        return _unreadable(path, error)
    if verify:
        _verify(found, files)
    if probe:
        _probe(found, path)
    return found


def _file(path: Path, file: TensorFile) -> Inspection:
    found = Inspection(str(path), "", _size(path), file.format, tensors=len(file))
    try:
        if other := other_kind(file):
            _other(found, other, file)
        else:
            describe(found, open_checkpoint(path))
    except CheckpointError as error:
        found.problems.append(_bare(error, path))
    except (LookupError, ArithmeticError, ValueError, TypeError) as error:
        # shapes are unpacked by name: what is misshapen ends here
        found.problems.append(f"its tensors have the names of a known kind and impossible shapes ({error})")
    if not found.networks and not found.used:
        found.kind = found.kind or "tensors that minisd cannot make a network of"
        found.groups, found.unknown = _groups(file), []
        found.problems = found.problems or ["its tensors are those of no network that minisd knows"]
    if file.dropped:
        names = ", ".join(sorted(set(file.dropped)))
        found.notes.append(f"pickled objects were left out, nothing of them was run: {names}")
    _beside_state_dict(found, file)
    return found


def _other(found: Inspection, other: Kind, file: TensorFile) -> None:
    found.kind, found.family, found.facts = other.kind, other.base, other.facts
    found.needs, found.problems = other.needs, other.problems
    found.used, found.unknown = len(other.used), [name for name in file if name not in other.used]


def _folder(path: Path) -> tuple[Inspection, list[TensorFile]]:
    opened = open_checkpoint(path)
    found = Inspection(str(path), "", sum(_size(Path(f.path)) for f in opened.files), "diffusers folder")
    found.tensors = sum(map(len, opened.files))
    describe(found, opened)
    found.notes += opened.notes
    _folder_files(found, opened)
    return found, opened.files


def _unreadable(path: Path, error: CheckpointError) -> Inspection:
    found = Inspection(str(path), "cannot be read as a checkpoint", _size(path), problems=[_bare(error, path)])
    if is_png(path):
        _picture(found)
    if path.is_dir():
        inside = sorted(f.name for f in path.iterdir() if f.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"))
        found.needs += [f"one of the files in it: {_few(inside)}"] if inside else []
    return found


def _picture(found: Inspection) -> None:
    """A PNG: perhaps one of A1111's that carry an embedding."""
    try:
        name, vectors = read_picture(found.path)
    except CheckpointError as error:
        if "carries no embedding" not in str(error):
            found.problems.append(_bare(error, Path(found.path)))
        return
    kind = picture_kind(Path(found.path), name, tuple(vectors.shape))
    found.kind, found.family, found.facts = kind.kind, kind.base, kind.facts
    found.needs, found.problems = kind.needs, kind.problems
    if not vectors.isfinite().all():
        found.problems.append("its vectors hold values that are not finite (NaN, Inf)")


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


def _beside_state_dict(found: Inspection, file: TensorFile) -> None:
    """Tensors that a training file keeps next to its state_dict: they are never read."""
    if not isinstance(file.tree, dict) or not isinstance(file.tree.get("state_dict"), dict):
        return
    for place, tree in file.tree.items():
        entries = [entry for _, entry in flatten(tree, "")] if place != "state_dict" else []
        if entries:
            size = bytes_text(sum(entry.nbytes for entry in entries))
            found.notes.append(f"{place}, beside state_dict, holds {len(entries):,} tensors ({size}): never read")


def _folder_files(found: Inspection, opened: Opened) -> None:
    """The files that each component was read from, those that lie beside unused, and the parts that are missing."""
    read = {Path(file.path) for file in opened.files}
    for network, part in opened.contents.parts.items():
        place = part.tensors.file
        files = {Path(file.path) for file in place.place.values()} if isinstance(place, Tensors) else set()
        names = sorted(str(file.relative_to(opened.path)) for file in files)
        found.facts[TITLES[network]] = ", ".join(names) if len(names) < 3 else f"{names[0]} … ({len(names)} shards)"
        beside = {f for file in files for f in file.parent.iterdir() if f.suffix in (".safetensors", ".bin", ".ckpt")}
        if unused := sorted(str(file.relative_to(opened.path)) for file in beside - read):
            found.notes.append(f"not read, another file of the {TITLES[network]} comes first: {_few(unused)}")
    optional = {
        "scheduler": "the noise schedule is then SD's own, and eps or v told otherwise",
        "tokenizer": "CLIP's own comes with minisd",
    }
    if (opened.path / SUBFOLDERS["unet"]).is_dir():
        missing = [name for name in optional if not (opened.path / name).is_dir()]
        found.notes += [f"{name}/ is missing, which is no harm: {optional[name]}" for name in missing]


# ---------------------------------------------------------------------------------------------------- verify=, probe=


def _verify(found: Inspection, files: Iterable[TensorFile]) -> None:
    health = examine(files)
    found.problems += health.damage
    if health.checksums:
        found.facts["checksums"] = "match" + (
            f" in {health.checksums} of {health.files} files" if health.files > 1 else ""
        )
    elif not health.damage:
        found.facts["checksums"] = "none in it (torch's zip files have them, and what minisd saves)"
    for what, tensors in (("NaN", health.nan), ("Inf", health.inf)):
        if tensors:
            named = _few(f"{name} ({count:,})" for name, count in tensors.items())
            found.problems.append(f"{len(tensors)} tensors hold {what}: {named}")
    if not health.nan and not health.inf:
        found.facts["values"] = f"all {health.tensors:,} tensors were read: no NaN, no Inf"
    if health.zero:
        found.notes.append(f"{len(health.zero)} weights hold nothing but 0, an untrained layer? {_few(health.zero)}")


def _probe(found: Inspection, path: Path) -> None:
    if TITLES["unet"] not in {network.name for network in found.networks if not network.problem}:
        found.notes.append("there is no U-Net to probe")
        return
    try:
        mean = forward_probe(load_network(path, "unet", cast=lambda dtype: torch.float32))
    except CheckpointError as error:
        found.notes.append(f"the U-Net could not be probed: {_bare(error, path)}")
        return
    said = "v" if mean < PROBE_THRESHOLD else "eps"
    because = f"forward probe, mean(out - x) = {mean:.3f} (v where below {PROBE_THRESHOLD:g}; calibrated on SD 2.x)"
    found.evidence.append((said, because))
    against = "" if found.prediction in (None, said) else f", CONTRADICTS {found.prediction}"
    found.facts["probe"] = f"{said}: {because}{against}"
    if found.prediction is None:
        found.notes.append(f'the probe speaks for prediction="{said}"; loading does not run it: give it there')
    point_out_contradictions(found)
