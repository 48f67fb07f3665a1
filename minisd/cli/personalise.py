"""The commands that teach a model a subject: `minisd train dreambooth | lora | textual-inversion PHOTOS …`."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from minisd import __version__
from minisd.cli.options import Model
from minisd.cli.training import Settings
from minisd.training.options import Run, changed, read_changes

if TYPE_CHECKING:
    from minisd.stable_diffusion import StableDiffusion
    from minisd.training.subject.recipe import Scores


@Parameter(name="*", group=Group("Inputs", sort_key=1))
@dataclass(frozen=True)
class Inputs:
    """What is read. With --config all of it is known, and what is given here takes its place.

    Attributes:
        checkpoint: the model to start from; the mini model when left out.
        masks: a folder of masks, white on the subject, cat.png for cat.jpg; or cat.mask.png beside it.
        class_photos: a folder of real pictures of the class for the prior; drawn by the model when left out.
        class_folder: where drawn pictures of the class are kept for other runs; OUT/class when left out.
        test_photos: other photos of the subject, by which the validation pictures are scored.
        judge: a checkpoint whose CLIP scores them; the model's own when left out, if it has both towers.
        dino: a file of the official DINO ViT-S/16, a sharper judge of likeness.
    """

    checkpoint: Path | None = None
    masks: Path | None = None
    class_photos: Path | None = None
    class_folder: Path | None = None
    test_photos: Path | None = None
    judge: Path | None = None
    dino: Path | None = None


INPUTS = Inputs()


@dataclass(frozen=True)
class ShortRun(Run):
    __doc__ = Run.__doc__  # the help of its options; trainings of a few hundred steps are watched more closely

    save_every: int = 200
    log_every: int = 10
    sample_every: int = 200


SHORT = ShortRun()
Carried = Annotated[ShortRun, Parameter(name="*", group=Group("Run", sort_key=2))]
ClassWord = Annotated[str | None, Parameter(name="--class")]


def train_dreambooth(
    photos: Path | None = None,
    *,
    token: str | None = None,
    class_word: ClassWord = None,
    out: Path = Path("dreambooth"),
    config: Path | None = None,
    settings: Settings = (),
    inputs: Inputs = INPUTS,
    run: Carried = SHORT,
) -> None:
    """Teach a model one subject with all of its weights, beside what it knows of the subject's class.

    Args:
        photos: a folder of 3 to 6 photos of the subject; texts beside them (cat.jpg, cat.txt) are their captions.
        token: a rare word that shall mean it; "sks" when left out.
        class_word: what it is one of, such as dog.
        out: gets the state, log, curves and sheets, dreambooth.json, and the result, model.safetensors.
        config: the dreambooth.json of another run, to run it again; or a JSON file of fields that differ.
        settings: FIELD=VALUE: loop.steps=400, loop.precision=bfloat16, subject.recompute=true, prior.weight=0,
            text_encoder=true, subject.views.flip=true … Several may follow.
    """
    personalise("dreambooth", photos, token, class_word, out, config, settings, inputs, run)


def train_lora(
    photos: Path | None = None,
    *,
    token: str | None = None,
    class_word: ClassWord = None,
    out: Path = Path("lora"),
    config: Path | None = None,
    settings: Settings = (),
    inputs: Inputs = INPUTS,
    run: Carried = SHORT,
) -> None:
    """Teach a model one subject by a small file of low-rank additions: the cheap form of DreamBooth.

    Args:
        photos: a folder of 3 to 6 photos of the subject; texts beside them (cat.jpg, cat.txt) are their captions.
        token: a rare word that shall mean it; "sks" when left out.
        class_word: what it is one of, such as dog.
        out: gets the state, log, curves and sheets, lora.json, and lora.safetensors in kohya's and in peft's layout.
        config: the lora.json of another run, to run it again; or a JSON file of fields that differ.
        settings: FIELD=VALUE: rank=16, loop.steps=400, prior.weight=0, text=["*.attn.to_*"] … Several may follow.
    """
    personalise("lora", photos, token, class_word, out, config, settings, inputs, run)


def train_textual_inversion(
    photos: Path | None = None,
    *,
    token: str | None = None,
    class_word: ClassWord = None,
    out: Path = Path("textual-inversion"),
    config: Path | None = None,
    settings: Settings = (),
    inputs: Inputs = INPUTS,
    run: Carried = SHORT,
) -> None:
    """Teach a model one new word and leave all else as it is.

    Args:
        photos: a folder of 3 to 6 photos of the subject; texts beside them (cat.jpg, cat.txt) are their captions.
        token: the new word, such as "<my-cat>".
        class_word: what the subject is one of, such as cat; the word starts from it.
        out: gets the state, log, curves and sheets, textual-inversion.json, and the word in three layouts.
        config: the textual-inversion.json of another run, to run it again; or a JSON file of fields that differ.
        settings: FIELD=VALUE: vectors=4, initial="black cat", loop.steps=1000 … Several may follow.
    """
    personalise("textual-inversion", photos, token, class_word, out, config, settings, inputs, run)


def personalise(
    method: str,
    photos: Path | None,
    token: str | None,
    class_word: str | None,
    out: Path,
    file: Path | None,
    settings: list[str],
    inputs: Inputs,
    run: Run,
) -> None:
    """Run a method with what was given and, where a file is given, what that remembers."""
    changes = read_changes(file, ())
    again = "method" in changes
    remembered = changes.get("inputs", {}) if again else {}
    if again:
        if changes["method"] != method:
            raise ValueError(f"{file} is of `minisd train {changes['method']}`: run that")
        changes = changes["config"]
    photos = photos or _path(remembered.get("photos"))
    read = {field.name: getattr(inputs, field.name) or _path(remembered.get(field.name)) for field in fields(Inputs)}
    given = {name: said for name, said in (("token", token), ("class_word", class_word)) if said}
    usual = {"token": None if method == "textual-inversion" else "sks", "class_word": None}
    subject = usual | changes.get("subject", {}) | given
    for name, said in (("PHOTOS", photos), ("--token", subject["token"]), ("--class", subject["class_word"])):
        if not said:
            raise ValueError(f"{name} is missing: minisd train {method} PHOTOS --token TOKEN --class WORD")
    if not photos.is_dir():
        raise ValueError(f"{photos}: there is no such folder of photos")
    Model(device=run.device).check()
    changes = {**changes, "subject": subject}
    import minisd
    from minisd.files import write_whole
    from minisd.stable_diffusion import mini_model
    from minisd.training.parallel import processes
    from minisd.training.subject.photos import load_photos
    from minisd.training.subject.small import for_small_model, is_small

    train, made = _method(method, subject)
    said = read_changes(None, settings)
    plan = changed(changed(made, changes), said)
    hashes = _hashes(photos, read["checkpoint"] or mini_model())
    before = remembered.get("hashes", hashes)
    for name in sorted(hashes.keys() | before.keys()):
        if (was := before.get(name, "absent")) != (now := hashes.get(name, "absent")):
            warnings.warn(f"{name} is not what it was in {file} ({was}, now {now}): the result differs", stacklevel=2)
    with processes(run.device) as group:
        sd = minisd.load(read["checkpoint"], device=group.device)
        if is_small(sd) and not again:  # what was done again is all said
            plan = changed(changed(for_small_model(made), changes), said)
            if group.is_first:
                print(
                    f"a small model, taught as such: {plan.loop.steps} steps at rate {plan.loop.lr:g}", file=sys.stderr
                )
        size, seed = sd.config.image_size, plan.loop.seed
        loaded = load_photos(photos, size, plan.subject.views, masks=read["masks"], seed=seed)
        options: dict[str, Any] = {"scores": _scores(sd, read, photos)}
        if method != "textual-inversion":
            if read["class_photos"]:
                options["class_photos"] = load_photos(read["class_photos"], size)
            options["class_folder"] = read["class_folder"]
        about = {
            "method": method,
            "inputs": {name: str(path) for name, path in ({"photos": photos} | read).items() if path}
            | {"hashes": hashes},
            "versions": _versions(),
            "config": asdict(plan),
        }
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        if group.is_first:
            check_free(out / f"{method}.json", json.loads(text))
            write_whole(out / f"{method}.json", lambda file: file.write(text.encode()))
        train(sd, loaded, out, plan, run, group, **options)
    for path in sorted([*out.glob("*.safetensors"), *out.glob("*.pt")]):
        if path.name not in WORK:
            print(path)


def check_free(path: Path, about: dict) -> None:
    """ValueError where the file that says how a run was made is of another run, whose results lie beside it."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = _of_result(before) == _of_result(about)
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(f"{path} is of another run (other photos, or another config): choose another --out")


def _of_result(about: dict) -> list:
    """What the result depends on: neither how memory is saved, nor by what the way there is judged."""
    config = about["config"] | {"subject": about["config"]["subject"] | {"recompute": None}}
    inputs = [about["inputs"].get(name) for name in ("hashes", "masks", "class_photos")]
    return [config, *inputs]


WORK = ("state.safetensors", "photos.safetensors", "class.safetensors", "best.safetensors")  # no results


def _method(method: str, subject: dict) -> tuple[Callable, Any]:
    """What trains, and its config where nothing but the subject is given."""
    from minisd.training.subject import dreambooth, lora, textual_inversion
    from minisd.training.subject.recipe import SubjectConfig

    train, config = {
        "dreambooth": (dreambooth.train_dreambooth, dreambooth.DreamBoothConfig),
        "lora": (lora.train_lora, lora.LoRAConfig),
        "textual-inversion": (textual_inversion.train_textual_inversion, textual_inversion.TextualInversionConfig),
    }[method]
    return train, config(SubjectConfig(subject["token"], subject["class_word"]))


def _scores(sd: StableDiffusion, read: dict[str, Path | None], photos: Path) -> Scores | None:
    """The judge of the validation pictures; none, and a word about it, where nothing can tell likeness."""
    from minisd.checkpoints.load import load_network
    from minisd.eval.features import CLIPFeatures, DINOFeatures
    from minisd.eval.subject import SubjectJudge
    from minisd.tasks.images import load_image
    from minisd.text.tokenizer import Tokenizer
    from minisd.training.subject.photos import photo_paths

    if read["judge"]:
        text, vision = (load_network(read["judge"], name, device=sd.device) for name in ("text", "vision"))
        own = text.config
        clip = CLIPFeatures(text, vision, Tokenizer(length=own.length, pad_id=own.pad_id, dialect=own.dialect))
    elif sd.vision_encoder is not None:
        clip = CLIPFeatures.of(sd)
    else:
        print("no scores on the way: this model has no vision tower (--judge takes a CLIP)", file=sys.stderr)
        return None
    dino = read["dino"] and DINOFeatures.load(read["dino"], device=sd.device)
    real = []
    for path in photo_paths(read["test_photos"] or photos):
        with contextlib.suppress(ValueError):  # load_photos names what cannot be read
            real.append(load_image(path))
    judge = SubjectJudge(clip, real, dino)
    by = "other photos" if read["test_photos"] else "the photos it learns from (--test-photos takes others)"
    print(f"scored by {judge.spaces['CLIP-I']}, against {by}", file=sys.stderr)
    return judge.scores


def _path(text: str | None) -> Path | None:
    return text and Path(text)


def _hashes(photos: Path, checkpoint: Path) -> dict[str, str]:
    from minisd.files import fingerprint, sha256
    from minisd.training.subject.photos import photo_paths

    return {"checkpoint": fingerprint(checkpoint)} | {path.name: sha256(path) for path in photo_paths(photos)}


def _versions() -> dict[str, str]:
    import torch

    return {"minisd": __version__, "torch": torch.__version__, "python": platform.python_version()}
