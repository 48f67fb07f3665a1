"""Where a whole `minisd txt2img` spends its time: the command's own functions, one after the other, timed.

`python -m minisd.bench.startup CHECKPOINT OUT PROMPT` is one such process; `startup` runs several.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def startup(checkpoint: Path | None, prompt: str, runs: int) -> dict[str, float]:
    """Seconds of each phase of `minisd txt2img`, and of the whole process: medians of `runs` processes each.

    checkpoint: the mini model when None. ValueError where the command fails.
    """
    from minisd.stable_diffusion import mini_model

    checkpoint, phases, whole = checkpoint or mini_model(), [], []
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as folder:
        for i in range(runs):
            out = Path(folder, f"{i}.png")
            phases.append(json.loads(_python("minisd.bench.startup", str(checkpoint), str(out), prompt)))
            start = time.perf_counter()
            _python(
                "minisd", "txt2img", prompt, "--checkpoint", str(checkpoint), "--out", str(Path(folder, f"w{i}.png"))
            )
            whole.append(time.perf_counter() - start)
    return {name: median(run[name] for run in phases) for name in phases[0]} | {"whole process": median(whole)}


def _python(module: str, *arguments: str) -> str:
    """The last line that `python -m module` prints."""
    process = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    if process.returncode:
        raise ValueError((process.stderr.strip().splitlines() or ["it failed"])[-1])
    return process.stdout.splitlines()[-1]


def profile(checkpoint: Path, out: Path, prompt: str) -> dict[str, float]:
    """Seconds of each phase of `minisd.cli.generate.make`, in a fresh process."""
    phases, last = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        phases[name], last = now - last, now

    import minisd.stable_diffusion
    from minisd.provenance.call import Call, File, LoadedModel
    from minisd.provenance.png import save_png
    from minisd.tasks import Txt2Img

    lap("import")
    sd = minisd.stable_diffusion.load(checkpoint)
    lap("load")
    sampling = next(Txt2Img().samplings(sd, prompt))
    lap("text")
    for _ in sampling:
        pass
    lap(f"{len(sampling)} steps")
    images = sampling.images()
    lap("decode")
    call = Call(Txt2Img(), [prompt], LoadedModel(File(checkpoint.name, "")))
    save_png(out, images[0], call, 0)
    lap("save")
    return phases


if __name__ == "__main__":
    print(json.dumps(profile(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
