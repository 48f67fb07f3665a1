"""minisd: Stable Diffusion written once, from scratch, in plain PyTorch.

Names are imported when they are first used (PEP 562), so `import minisd` and `minisd --help` never wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULE_OF = {
    "attention": "minisd.runtime.kernels",
    "Conditioning": "minisd.models.unet",
    "load": "minisd.stable_diffusion",
    "load_controlnet": "minisd.stable_diffusion",
    "StableDiffusion": "minisd.stable_diffusion",
    "optimize": "minisd.runtime.optimize",
    "Schedule": "minisd.diffusion.schedule",
    "linear_betas": "minisd.diffusion.schedule",
    "scaled_linear_betas": "minisd.diffusion.schedule",
    "cosine_betas": "minisd.diffusion.schedule",
}
_SUBMODULE = {"config": "minisd.config", "samplers": "minisd.diffusion.samplers"}

__all__ = [*_MODULE_OF, *_SUBMODULE]


def __getattr__(name: str):
    if name in _SUBMODULE:
        return import_module(_SUBMODULE[name])
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'minisd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
