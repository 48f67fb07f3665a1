"""The command line: `minisd COMMAND …`. Every option is a parameter of the function that runs the command."""

from __future__ import annotations

import os
import sys
import warnings

from cyclopts import App, Parameter

from minisd import __version__

app = App(
    name="minisd",
    help="Stable Diffusion in plain PyTorch: make pictures, run official checkpoints, look inside.",
    version=__version__,
    default_parameter=Parameter(negative=()),  # no --no-… or --empty-… twins
)
plot = App(name="plot", help="Figures to study diffusion by.")
bench = App(name="bench", help="Measure minisd, beside its peers where they are installed.")

# Named by import path: a command's module, and with it torch, is imported only when that command is asked for.
_COMMANDS = {
    "generate": {
        "txt2img": "Draw pictures of one or several prompts.",
        "img2img": "Redraw a picture after a prompt.",
        "inpaint": "Repaint the part of a picture where a mask is white.",
        "outpaint": "Paint on beyond the edges of a picture.",
        "replay": "Make a picture again from what it says of itself, and compare.",
    },
    "files": {
        "inspect": "Say what a checkpoint is, what is in it, and what it needs to run.",
        "convert": "Rewrite a checkpoint in another layout or dtype, losing nothing.",
    },
}
for module, commands in _COMMANDS.items():
    for name, text in commands.items():
        app.command(f"minisd.cli.{module}:{name}", name=name, help=text)
for name, text in {
    "schedules": "β, ᾱ and log-SNR of noise schedules, in one figure.",
    "noising": "A picture sinking into noise, under several schedules.",
    "trajectory": "What the model believes the picture to be, step by step.",
    "attention": "Where a picture looks at each word of its prompt.",
}.items():
    plot.command(f"minisd.cli.study:plot_{name}", name=name, help=text)
bench.command("minisd.cli.study:bench_load", name="load", help="Time and memory of loading a checkpoint.")
app.command(plot)
app.command(bench)


def main() -> None:
    """Run the command line; what the user can mend is told in one sentence, without a traceback."""
    warnings.showwarning = _say_warning
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        is_bug = isinstance(error, ImportError) and error.name is not None  # not our own "pip install 'minisd[…]'"
        if is_bug or os.environ.get("MINISD_TRACEBACK"):
            raise
        print(f"minisd: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("minisd: interrupted", file=sys.stderr)
        sys.exit(130)


def _say_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning is a sentence to the user, not a place in the source."""
    print(f"minisd: note: {message}", file=sys.stderr)
