"""What Stable Diffusion is asked to do, one task per file. Each is a generator of `Sampling`s, one per batch:

for sampling in txt2img(sd, "a red apple"):
    for step in sampling:            # a progress bar, a preview, an early stop: the loop is the caller's
        ...
    images = sampling.images()
"""

from minisd.diffusion.samplers import Step
from minisd.tasks.img2img import img2img
from minisd.tasks.inpaint import inpaint, outpaint
from minisd.tasks.nonfinite import NonFiniteError
from minisd.tasks.sampling import Sampling
from minisd.tasks.txt2img import txt2img

__all__ = ["NonFiniteError", "Sampling", "Step", "img2img", "inpaint", "outpaint", "txt2img"]
