"""Training: one file per recipe, all of them over the flat loop of `loop.py`. Read in this order:

`ddpm` (the smallest lesson), `loop`, `draws` (all chance from the step's number), `vae`, `clip`, `latent_diffusion`,
`mini` (the three in a row).
"""
