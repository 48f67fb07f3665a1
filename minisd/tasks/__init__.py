"""What a latent diffusion model is asked to do, one task per file. Each is a generator of `Sampling`s, one per batch:

for sampling in txt2img(sd, "a red apple"):
    for step in sampling:            # a progress bar, a preview, an early stop: the loop is the caller's
        ...
    images = sampling.images()

A new task is a dataclass of its options with the method that runs it, in a file of its own, and a line in TASKS: it
then is a method of `StableDiffusion`, a command, and what the metadata of a PNG can replay.
"""

from minisd.tasks.img2img import Img2Img
from minisd.tasks.inpaint import Inpaint
from minisd.tasks.options import Options, function
from minisd.tasks.outpaint import Outpaint
from minisd.tasks.txt2img import Txt2Img

TASKS: dict[str, type[Options]] = {task.name: task for task in (Txt2Img, Img2Img, Inpaint, Outpaint)}

txt2img, img2img, inpaint, outpaint = map(function, TASKS.values())

__all__ = ["TASKS", "Img2Img", "Inpaint", "Options", "Outpaint", "Txt2Img", "img2img", "inpaint", "outpaint", "txt2img"]
