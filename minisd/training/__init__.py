"""Training: one file per recipe, all of them over the flat loop of `loop.py`. Read in this order:

`ddpm` (the smallest lesson), `loop`, `draws` (all chance from the step's number), `vae`, `clip`, `latent_diffusion`,
`mini` (the three in a row). A subject from a few photos: `photos`, `subject` (the loss), then `dreambooth` (with
`prior`), `textual_inversion`, `lora`; `comparison` sets them beside each other.
"""
