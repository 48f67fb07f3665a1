"""The forward process: betas, ᾱ, q(x_t | x_0), and the conversions between x_0, ε and v.

Everything is float64 on the CPU until it meets a tensor. Timesteps t lie in [0, T-1] and may be fractional: log σ is
linear between neighbouring integers. x_t is always variance preserving, x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from minisd.diffusion.spacing import timesteps

Time = int | float | Tensor


class Schedule:
    """The noise levels of T timesteps, given by their betas (Ho et al. 2020, eq. 2 and 4).

    betas: T numbers in (0, 1); the last may be 1 (zero terminal SNR). final_alpha_cumprod: the ᾱ that follows the last
    step of ddim and plms; None means ᾱ[0], Stable Diffusion's convention. Everything else ends at ᾱ = 1.
    A timestep t is an int, a float or a tensor 'b'. Keep such tensors on the CPU: the tables live there.
    """

    def __init__(self, betas: Tensor | Sequence[float], final_alpha_cumprod: float | None = None):
        self.betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().clone()
        if self.betas.ndim != 1 or not len(self.betas):
            raise ValueError(f"betas have shape {tuple(self.betas.shape)}: give a list of T numbers")
        inside = (self.betas > 0) & (self.betas < 1)
        inside[-1] |= self.betas[-1] == 1
        if not inside.all():
            i = int((~inside).nonzero()[0])
            raise ValueError(f"beta[{i}] is {self.betas[i]:g}: betas lie in (0, 1), and only the last may be 1")
        self.alphas_cumprod = torch.cumprod(1 - self.betas, dim=0)
        self.final_alpha_cumprod = float(self.alphas_cumprod[0] if final_alpha_cumprod is None else final_alpha_cumprod)
        if not 0 < self.final_alpha_cumprod <= 1:
            raise ValueError(f"final_alpha_cumprod is {final_alpha_cumprod}: it lies in (0, 1]")

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1-ᾱ) of every timestep, 'T'."""
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """σ = √((1-ᾱ)/ᾱ) of every timestep, 'T': the noise level where x is not shrunk (Karras et al. 2022)."""
        return self.snr.rsqrt()

    def alpha_cumprod(self, t: Time) -> Tensor:
        """ᾱ at t, float64 on the CPU, of the shape of t. Exact at integers; between them log σ is linear in t.

        Where ᾱ_T-1 = 0 its log σ is infinite, and so is that of any t in (T-2, T-1): ᾱ is 0 there.
        """
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        last = self.num_timesteps - 1
        if not ((t >= 0) & (t <= last)).all():
            raise ValueError(f"t = {t.tolist()} is not within the schedule's [0, {last}]")
        low, high = t.floor().long(), t.ceil().long()
        log_sigmas = self.sigmas.log()
        log_sigma = log_sigmas[low] + (t - low) * (log_sigmas[high] - log_sigmas[low])
        # At integers the table itself: exact, and free of 0 · ∞ beside an infinite log σ.
        return torch.where(low == high, self.alphas_cumprod[low], torch.sigmoid(-2 * log_sigma))

    def sigma(self, t: Time) -> Tensor:
        """σ at t, float64 on the CPU, of the shape of t."""
        abar = self.alpha_cumprod(t)
        return ((1 - abar) / abar).sqrt()

    def t_from_sigma(self, sigma: float | Tensor) -> Tensor:
        """The t with that σ, fractional, float64 on the CPU: inverts `sigma`. σ must lie in the schedule's range."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device="cpu")
        finite = self.sigmas[self.sigmas.isfinite()]
        low, high = finite[0].item(), finite[-1].item()
        # A float32 copy of an end of the range is that end.
        inside = (sigma >= low * (1 - 1e-6)) & (sigma <= high * (1 + 1e-6))
        if not inside.all():
            raise ValueError(f"sigma = {sigma.tolist()} is not within the schedule's [{low:.6g}, {high:.6g}]")
        log_sigma, table = sigma.clamp(low, high).log(), finite.log()
        i = torch.searchsorted(table, log_sigma, right=True).clamp(1, len(table) - 1) - 1
        t = i + (log_sigma - table[i]) / (table[i + 1] - table[i])
        return t.clamp(0, len(table) - 1)  # a rounded logarithm must not leave the schedule

    def timesteps(self, n: int, spacing: str = "leading", offset: int = 1) -> list[int]:
        """n timesteps of this schedule, descending; `spacing.timesteps` explains the kinds."""
        return timesteps(self.num_timesteps, n, spacing, offset)

    # x_0, ε and v: any one and x_t give the others (Salimans & Ho 2022, appendix D).

    def q_sample(self, x_0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """x_t = √ᾱ x_0 + √(1-ᾱ) ε (Ho et al. 2020, eq. 4). x_0, noise: 'b ...'."""
        abar = self.alpha_cumprod(t)
        return weighted_sum(abar.sqrt(), x_0, (1 - abar).sqrt(), noise)

    def v_target(self, x_0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """v = √ᾱ ε - √(1-ᾱ) x_0, what a v-prediction network is trained on."""
        abar = self.alpha_cumprod(t)
        return weighted_sum(abar.sqrt(), noise, -(1 - abar).sqrt(), x_0)

    def target(self, x_0: Tensor, t: Time, noise: Tensor, prediction: str) -> Tensor:
        """What a network that predicts "eps", "v" or "x_0" should return for x_t = q_sample(x_0, t, noise)."""
        if prediction == "v":
            return self.v_target(x_0, t, noise)
        if prediction in ("eps", "x_0"):
            return noise if prediction == "eps" else x_0
        raise ValueError(f"a network cannot predict {prediction!r}; known: eps, x_0, v")

    def x_0_from_eps(self, x_t: Tensor, t: Time, eps: Tensor) -> Tensor:
        """x_0 = (x_t - √(1-ᾱ) ε) / √ᾱ. Refuses ᾱ = 0."""
        abar = self._with_signal(t)
        return weighted_sum(abar.rsqrt(), x_t, -((1 - abar) / abar).sqrt(), eps)

    def eps_from_x_0(self, x_t: Tensor, t: Time, x_0: Tensor) -> Tensor:
        """ε = (x_t - √ᾱ x_0) / √(1-ᾱ)."""
        abar = self.alpha_cumprod(t)
        return weighted_sum((1 - abar).rsqrt(), x_t, -(abar / (1 - abar)).sqrt(), x_0)

    def x_0_from_v(self, x_t: Tensor, t: Time, v: Tensor) -> Tensor:
        """x_0 = √ᾱ x_t - √(1-ᾱ) v."""
        abar = self.alpha_cumprod(t)
        return weighted_sum(abar.sqrt(), x_t, -(1 - abar).sqrt(), v)

    def v_from_x_0(self, x_t: Tensor, t: Time, x_0: Tensor) -> Tensor:
        """v = (√ᾱ x_t - x_0) / √(1-ᾱ)."""
        abar = self.alpha_cumprod(t)
        return weighted_sum((abar / (1 - abar)).sqrt(), x_t, -(1 - abar).rsqrt(), x_0)

    def eps_from_v(self, x_t: Tensor, t: Time, v: Tensor) -> Tensor:
        """ε = √(1-ᾱ) x_t + √ᾱ v."""
        abar = self.alpha_cumprod(t)
        return weighted_sum((1 - abar).sqrt(), x_t, abar.sqrt(), v)

    def v_from_eps(self, x_t: Tensor, t: Time, eps: Tensor) -> Tensor:
        """v = (ε - √(1-ᾱ) x_t) / √ᾱ. Refuses ᾱ = 0."""
        abar = self._with_signal(t)
        return weighted_sum(abar.rsqrt(), eps, -((1 - abar) / abar).sqrt(), x_t)

    def _with_signal(self, t: Time) -> Tensor:
        abar = self.alpha_cumprod(t)
        if (abar == 0).any():
            raise ValueError(
                f"the signal-to-noise ratio at t = {t} is 0: there x_t is ε itself and says nothing of x_0 or v; "
                "use a network that predicts v or x_0, or a schedule without zero terminal SNR"
            )
        return abar


def weighted_sum(*terms: Tensor) -> Tensor:
    """a x + b y + … of the terms a, x, b, y, …: coefficients '' or 'b' (any device), tensors 'b ...', in their type.

    Half-precision tensors are summed in float32 and rounded once: the coefficients reach from 1e-4 to 1e4.
    """
    coefficients, tensors = terms[::2], terms[1::2]
    total = reduce(torch.add, (expand(a, x) * x for a, x in zip(coefficients, tensors, strict=True)))
    return total.to(reduce(torch.promote_types, (x.dtype for x in tensors)))


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient '' or 'b' as '1|b 1 1 ...', ready to be multiplied with x, at least float32."""
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and len(coefficient) not in (1, len(x))):
        shape = tuple(coefficient.shape)
        raise ValueError(f"a time or scale of shape {shape} for a batch of {len(x)}: give one number, or one per image")
    coefficient = coefficient.reshape(-1, *[1] * (x.ndim - 1))
    return coefficient.to(x.device, torch.promote_types(x.dtype, torch.float32))


def linear_betas(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """DDPM's betas (Ho et al. 2020, section 4). For T ≠ 1000 improved DDPM scales both ends by 1000/T."""
    return torch.linspace(start, end, T, dtype=torch.float64)


def scaled_linear_betas(T: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """Stable Diffusion's betas, linear in √β. CompVis calls them "linear"."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), T, dtype=torch.float64) ** 2


def cosine_betas(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """ᾱ close to cos²((t/T + s)/(1 + s) · π/2) (Nichol & Dhariwal 2021, eq. 17), every beta capped."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=max_beta)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last ᾱ is exactly 0, √ᾱ shifted and stretched (Lin et al. 2023, algorithm 1).

    Needs a network that predicts v or x_0, and trailing timesteps so that the last step is visited.
    """
    root = torch.cumprod(1 - betas.to(torch.float64), dim=0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
