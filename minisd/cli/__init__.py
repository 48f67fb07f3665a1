"""The command line: `minisd COMMAND …`. Every option is a parameter of the function that runs the command."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import get_args

from cyclopts import App, CycloptsError, Group, Parameter, convert

from minisd import __version__
from minisd.cli.help import formatter
from minisd.tasks import TASKS
from minisd.training.recipes import RECIPES
from minisd.training.subject import METHODS

# Named by import path: a command's module, and with it torch, is imported only when that command is asked for.
COMMANDS = {
    **{f"generate:{name}": (task.__doc__ or "").partition("\n")[0] for name, task in TASKS.items()},
    "replay:replay": "Make an image again from what its PNG says of itself, and compare.",
    "files:inspect": "Say what a checkpoint, LoRA or embedding is, and how to run it.",
    "files:convert": "Convert a checkpoint: .ckpt to .safetensors, to a diffusers folder and back, to fp16.",
}
PLOTS = {
    "study:plot_schedules": "Noise schedules side by side: β, ᾱ and log-SNR over t.",
    "study:plot_noising": "Forward process: an image noised step by step under several schedules.",
    "study:plot_trajectory": "Denoising trajectory: the predicted x_0 at each step of sampling.",
    "study:plot_attention": "Cross-attention maps: where an image attends to each word of its prompt.",
}
TRAININGS = {f"training:train_{name}": line for name, line in RECIPES.items()} | {
    f"personalise:train_{name}": line for name, line in METHODS.items()
}
EVALUATIONS = {
    "evaluate:eval_mini": "Evaluate a model trained on the emoji: reconstruction, retrieval, samples.",
    "subjects:eval_subjects": f"Compare {', '.join(name.replace('_', ' ') for name in METHODS)} on held-out subjects.",
}
BENCHES = {
    "bench:bench_unet": "One denoising step of SD 1's U-Net with CFG: time and peak memory.",
    "bench:bench_vae": "Decoding and encoding with SD 1's VAE: time and peak memory.",
    "bench:bench_txt2img": "Whole images by SD 1, and the start-up of `minisd txt2img`.",
    "bench:bench_load": "Loading an SD 1 checkpoint: time and peak memory.",
    "bench:bench_train": "One training step of textual inversion, LoRA and DreamBooth on SD 1.",
    "bench:bench_attention": "Every implementation of attention in SD's shapes: time and error.",
    "bench:bench_all": "Every benchmark in turn: half an hour or more.",
}
# By what is typed after "minisd".
USAGE = {"txt2img": "txt2img [OPTIONS] PROMPT...", "plot schedules": "plot schedules [OPTIONS] [NAME...]"}
EXAMPLES = {
    "txt2img": [
        'minisd txt2img "a red apple" --out apple.png',
        'minisd txt2img "a red apple" "a blue vase" --num-images 4 --grid sheet.png',
        "minisd txt2img --prompts prompts.txt --checkpoint sd-v1-5.ckpt --weights ema",
        'minisd txt2img "a red apple" --sampler dpmpp_2m --spacing karras --steps 20',
        'minisd txt2img "a <cat-toy>" --embedding cat-toy.pt --lora style.safetensors:0.8 --checkpoint sd-v1-5.ckpt',
    ],
    "img2img": ['minisd img2img "an oil painting of a harbour" harbour.jpg --strength 0.6'],
    "inpaint": ['minisd inpaint "a cat" sofa.png mask.png --checkpoint sd-v1-5-inpainting.ckpt'],
    "outpaint": ['minisd outpaint "a wide beach" beach.png --left 128 --right 128'],
    "replay": ["minisd replay apple.png", "minisd replay apple.png --checkpoint moved/model.safetensors"],
    "inspect": ["minisd inspect model.safetensors", "minisd inspect model.ckpt --verify --json"],
    "convert": ["minisd convert model.ckpt model.safetensors --dtype float16", "minisd convert model.ckpt folder"],
    "plot schedules": ["minisd plot schedules linear cosine scaled_linear-zsnr --out schedules.svg"],
    "plot noising": ["minisd plot noising cat.jpg --schedules linear cosine"],
    "plot trajectory": ['minisd plot trajectory "a red apple" --steps 20 --panels 8'],
    "train mini": [
        "minisd train mini emoji",
        "minisd train mini emoji --set unet.loop.steps=1000 unet.model.prediction=eps --out quick",
        "minisd train mini my-drawings --start-from weights/mini.safetensors",
        "torchrun --nproc-per-node 2 -m minisd train mini emoji",
    ],
    "eval subjects": ["minisd eval subjects duck violin", "minisd eval subjects --all", "minisd eval subjects"],
    "train lora": [
        "minisd train lora my-cat --token sks --class cat",
        "minisd train lora my-cat --class cat --rank 16 --steps 400 --checkpoint sd-v1-5.safetensors",
        "minisd train lora --config lora/lora.json --out again",
    ],
    "train dreambooth": [
        "minisd train dreambooth my-cat --token sks --class cat",
        "minisd train dreambooth my-cat --class cat --device cuda --set subject.gradient_checkpointing=true",
    ],
    "train textual-inversion": [
        'minisd train textual-inversion my-cat --token "<my-cat>" --class cat --set vectors=4',
    ],
    "train ddpm": ["minisd train ddpm flowers --resolution 64 --set schedule.kind=cosine"],
    "eval mini": ["minisd eval mini --data emoji", "minisd eval mini --checkpoint mini/mini.safetensors --steps 50"],
    "bench unet": [
        "minisd bench unet --dtype bfloat16 --peers diffusers --json unet.json",
        "minisd bench unet --size 256,512,768,1024 --plot growth.png",
        "minisd bench unet --batch 1,2,4,8 --device cuda --dtype float16 --peers diffusers,diffusers-compiled",
    ],
    "bench vae": ["minisd bench vae --dtype bfloat16 --pairs 7"],
    "bench txt2img": ["minisd bench txt2img --dtype bfloat16 --steps 10 --pairs 3 --json txt2img.json"],
    "bench train": [
        "minisd bench train --dtype bfloat16 --peers diffusers",
        "minisd bench train --method lora dreambooth --gradient-checkpointing --json train.json",
    ],
    "bench attention": [
        "minisd bench attention --dtype bfloat16 --peers sdpa",
        "minisd bench attention --device cuda --dtype float16 --training --json attention.json",
    ],
    "bench load": ["minisd bench load --dtype float16"],
    "bench all": ["minisd bench all --dtype bfloat16 --peers diffusers --json all.json"],
    "plot attention": ['minisd plot attention "a red apple on a blue table"'],
}


def _app(name: str, text: str, commands: dict[str, str], **options) -> App:
    parameters = Group("Parameters", sort_key=0)
    app = App(
        name=name,
        help=text,
        help_format="plaintext",
        help_formatter=formatter,
        group_arguments=parameters,
        group_parameters=parameters,
        default_parameter=Parameter(negative=(), show_default=_shown_default, converter=_converted),
        **options,
    )
    for position, (path, line) in enumerate(commands.items()):
        function = path.rpartition(":")[2]
        command = (function.partition("_")[2] or function).replace("_", "-")
        typed = command if name == "minisd" else f"{name} {command}"
        examples = "\n".join(f"  {example}" for example in EXAMPLES.get(typed, ()))
        app.command(
            f"minisd.cli.{path}",
            name=command,
            help=line,
            sort_key=position,
            usage=f"Usage: minisd {USAGE[typed]}" if typed in USAGE else None,
            help_epilogue=f"Examples:\n{examples}" if examples else None,
        )
    return app


def _converted(type_, tokens):
    """What the tokens say, as cyclopts reads it, but that a fraction is no whole number: it would round 4.5 to 4."""
    if int in (type_, *get_args(type_)):
        for token in tokens:
            if "." in token.value and not float(token.value).is_integer():
                raise ValueError(f"{token.value} is not a whole number")
    return convert(type_, tokens)


def _shown_default(value) -> str | None:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or None
    return None if value in (None, "") or value is False else str(value)


app = _app(
    "minisd",
    "Stable Diffusion in plain PyTorch: make pictures, run official checkpoints, look inside.",
    COMMANDS,
    version=__version__,
    suppress_keyboard_interrupt=False,
)
app.command(
    _app(
        "plot",
        "Plot noise schedules, the forward process, denoising trajectories, attention maps.",
        PLOTS,
        sort_key=100,
    )
)
app.command(_app("train", "Train models from scratch, or teach one a subject.", TRAININGS, sort_key=99))
app.command(_app("eval", "Evaluate models.", EVALUATIONS, sort_key=100))
app.command(
    _app(
        "bench",
        "Benchmark minisd, beside diffusers and OpenVINO where installed; random weights, nothing downloaded.",
        BENCHES,
        sort_key=101,
    )
)


def main(tokens: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; what the user can mend is told in one sentence on stderr.

    0: done. 1: it could not be done, or a replayed picture differs. 2: the command line was not understood.
    130: interrupted. MINISD_TRACEBACK=1 shows where an error came from.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console without "β" is no reason to stop
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return app(tokens, exit_on_error=False, print_error=False, result_action="return_value") or 0
        except CycloptsError as error:
            _say(f"{error} (--help tells more)")
            return 2
        except KeyboardInterrupt as error:
            _say(f"interrupted{error}")
            return 130
        except Exception as error:
            if os.environ.get("MINISD_TRACEBACK") or (sentence := _explain(error)) is None:
                raise
            _say(sentence)
            return 1


def _explain(error: Exception) -> str | None:
    """A sentence for what lies with the user, the files or the machine; None for a fault of the program."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if isinstance(error, ImportError) and "pip install" in str(error):  # our own, of an extra that is missing
        return str(error)
    words = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA's, Linux's, Windows'
    if isinstance(error, MemoryError) or any(phrase in str(error) for phrase in words):
        return "the memory does not suffice: smaller pictures, --dtype bfloat16, or a GPU's --offload need less of it"
    return None


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning is a sentence to the user, not a place in the source."""
    _say(f"note: {message}")


def _say(text: str) -> None:
    print(f"minisd: {text}", file=sys.stderr)
