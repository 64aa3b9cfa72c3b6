"""Vector quantization as classification by hyperplanes of hyperbolic space (HyperVQ)."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vqcore import losses, noise
from vqcore.assign import exact_products
from vqcore.codebook import only, pick, precise, unit
from vqcore.derived import DerivedCodebook, refuse_misfit
from vqcore.mixture import Noise, padded_product, tile_height
from vqcore.poincare import Hyperplanes, exp_map_zero, hyperplanes, lift, project
from vqcore.quantizers import from_data
from vqcore.quantizers.arguments import check_positive, check_sizes
from vqcore.quantizers.contract import Quantized, VectorBatch, quantized
from vqcore.quantizers.rows import Rows, full_precision, keys_of, rows_of
from vqcore.quantizers.updates import Updates
from vqcore.reduction import Reduction, resolve
from vqcore.update import Rule

# How far inside the ball points are kept, in float64 too: the float64 mode must be the same function.
_MARGIN = 4e-3
_NEAREST, _FARTHEST = 0.1, 1.0
_OFFSETS = 2
"""The `stream` of noise.shared_uniform that the offsets are drawn from."""


class HyperbolicQuantizer(nn.Module):
    """HyperVQ (Goswami et al. 2024, arXiv 2403.13015): the code of x is the class that a hyperbolic multinomial
    logistic regression gives it, and its vector represents the winning hyperplane. With s = sqrt(c), and z_k [D] and
    r_k learned:

        y   = project(exp_0(x))                                              the Poincare ball, see vqcore.poincare
        v_k = 2 |z_k| x signed distance of y from hyperplane k               equation 6; `unidirectional_mlr`
        k   = argmax_k (v_k + g_k), g Gumbel noise; in evaluation argmax_k v_k
        code vector = log_0(q_k) = r_k z_k / |z_k|                           q_k: the plane's point nearest the origin

    The code need not be the nearest one, and r and z are all there is: no embedding table, no moving average, no
    revival. There is no loss of its own either (`loss` is exactly 0): everything learns from the task's loss.

    Gradient: straight-through on the *weights*. Going forward w is one-hot; going back it is p = softmax((v + g) /
    temperature), so that with G the gradient of the output and codes e_k,

        dv_k = p_k (G.e_k - sum_l p_l G.e_l) / temperature        de_k = sum of G over the rows whose code is k

    and x learns only through v. Copying G to x instead (an estimator of vqcore.estimators) would leave the planes
    untrained. The N x K matrices exist one tile of rows at a time, and are computed again on the way back.

    Shapes: x [..., D] of any leading dimensions, mask and keys [...]. `squared_error` is |x - code vector|^2, in the
    tangent space.

    Points are kept at |y| <= (1 - 0.004) / s, which is |x| = 3.1 / s; beyond it only the direction of x counts and only
    the direction gets a gradient. Choose c so that s |x| is about 1: c = 1 / D for unit-variance encoder outputs.

    Arguments:
        num_codes, code_dim: K and D.
        curvature: c > 0, fixed; the ball has curvature -c.
        temperature: tau of p. The attribute may be set before any training forward: the paper is reported to anneal it
            (1 to 0.1 is a start). It is not part of the state, and evaluation does not use it.
        normalise: False takes r_k z_k for the code vector, as the known ports of HyperVQ do; log_0(q_k) is exact.
        reduce: as in VectorQuantizer. One reduce a training step, of the counts.
        seed: of the first r and z, and of the noise, which is a function of (seed, step, key).

    z_k starts at N(0, 1/D) / s (Shimizu et al. 2021), r_k at U(0.1, 1). Their r_k = 0 is a trap here: then all codes
    are 0, no gradient reaches v, and the codebook never learns which code to choose.

    Raises ValueError for arguments outside these.
    """

    discrete = True
    accumulates = True

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        curvature: float = 1.0,
        temperature: float = 1.0,
        normalise: bool = True,
        reduce: Reduction | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(num_codes=num_codes, code_dim=code_dim)
        check_positive(curvature=curvature)
        rule = Rule(decay=None, revive_below=0.0, eps=0.0, seed=seed)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.curvature = curvature
        self.temperature = temperature
        self.normalise = normalise
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        drawn = noise.shared_uniform(seed, 0, num_codes, stream=_OFFSETS)
        z = from_data.normal_vectors(num_codes, code_dim, seed, 1.0 / math.sqrt(code_dim * curvature))
        self.z = nn.Parameter(z.to(dtype))
        self.r = nn.Parameter((_NEAREST + (_FARTHEST - _NEAREST) * drawn).float().to(dtype))
        self.codebook = DerivedCodebook(num_codes, code_dim, self._derive)
        self.codebook.mark_seeded()
        self._updates = Updates([self.codebook], [rule], reduce)

    def extra_repr(self) -> str:
        return f"curvature={self.curvature}, temperature={self.temperature}, normalise={self.normalise}"

    @property
    def temperature(self) -> float:
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        check_positive(temperature=temperature)
        self._temperature = temperature

    @property
    def seeded(self) -> bool:
        """True: the first planes are drawn by `seed`, never from data."""
        return self.codebook.is_seeded

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """One float64 [K]: global number of vectors per code, chosen with noise, in the newest update."""
        return (self.codebook.last_counts,)

    def revived_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Always empty: nothing is revived."""
        return []

    def forward(
        self,
        x: Float[Tensor, "*shape D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        keys: Int64[Tensor, "*shape"] | None = None,
    ) -> Quantized:
        """Quantize `x`. Output vectors are rows of the code table (float32 or better), in training too.

        In training all workers must call it equally often; backward can be taken once. Raises as
        VectorQuantizer.forward.
        """
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.z.dtype)
            self.codebook.require_seeded()
            if self.training:
                output, codes = self._draw(rows, x, keys)
            else:
                codes = _winners(rows, self._planes(), self.curvature, None)
                output = pick(self.codebook.readable(), codes)
            squared = losses.squared_error(rows.x.detach(), output.detach())
            loss = (rows.x * 0.0).sum() + (self.z * 0.0).sum() + (self.r * 0.0).sum()
        return quantized(x, rows, output, codes, loss, squared)

    @torch.no_grad()
    def assign(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Int64[Tensor, "*shape"]:
        """Codes of `x` without noise; -1 where masked or non-finite."""
        self.codebook.require_seeded()
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.z.dtype)
            return _winners(rows, self._planes(), self.curvature, None).reshape(x.shape[:-1])

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Code vectors of `codes`; -1 gives 0, others outside [0, K) raise ValueError."""
        return self.codebook.look_up(codes)

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """Forwards inside share one step, so one draw of noise a key; counts are taken once, on exit.

        See VectorQuantizer.accumulate."""
        return self._updates.accumulate(count, self.training)

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Refused: RuntimeError."""
        raise RuntimeError(
            "the hyperplanes of HyperbolicQuantizer come from its `seed`, not from data; there is nothing to seed"
        )

    def _draw(self, rows: Rows, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """(output, codes) of a training forward, which it counts."""
        statistics = self._updates.begin()
        named = keys_of(keys, x, resolve(self._updates.reduce).rank, statistics[0].seen)
        # The way back draws the noise again, after the update has moved the step.
        gumbel = Noise(self._updates.rules[0].seed, self.codebook.step.clone(), named)
        planes, table = self._planes(), self.codebook.vectors
        codes = _winners(rows, planes, self.curvature, gumbel)
        chosen = pick(table, codes)
        soft = _Soft(self.curvature, self.temperature, gumbel)
        output = only(rows.valid, _ThroughWeights.apply(chosen, rows.x, *planes, table.detach(), soft))
        statistics[0].add(rows.x, codes, None)
        self._updates.end(statistics, rows.valid)
        return output, codes

    def _planes(self) -> Hyperplanes:
        return hyperplanes(self.z, self.r, self.curvature)

    def _derive(self) -> Float[Tensor, "K D"]:
        return self.r.unsqueeze(-1) * (unit(self.z) if self.normalise else self.z)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HyperbolicQuantizer":
        super()._apply(precise(fn, ()), recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        refuse_misfit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Soft(NamedTuple):
    """What p depends on besides x and the planes."""

    curvature: float
    temperature: float
    gumbel: Noise


@torch.no_grad()
def _winners(rows: Rows, planes: Hyperplanes, curvature: float, gumbel: Noise | None) -> Int64[Tensor, " N"]:
    """argmax_k (v_k + g_k), of equal ones the lowest code; -1 where not valid."""
    codes = torch.empty(len(rows.x), dtype=torch.int64, device=rows.x.device)
    with exact_products(rows.x.device):
        for tile in _tiles(rows.x, len(planes.scales)):
            arguments = _arguments(_lifted(rows.x[tile], curvature), planes)
            codes[tile] = _noisy(arguments.asinh_().mul_(planes.scales), gumbel, tile).argmax(-1)
    return codes.masked_fill_(~rows.valid, -1)


def _tiles(x: Tensor, num_codes: int) -> Iterator[slice]:
    height = tile_height(num_codes)
    for start in range(0, len(x), height):
        yield slice(start, min(start + height, len(x)))


def _lifted(x: Float[Tensor, "n D"], curvature: float) -> Float[Tensor, "n D+1"]:
    return lift(project(exp_map_zero(x, curvature), curvature, _MARGIN), curvature)


def _arguments(lifted: Float[Tensor, "n D+1"], planes: Hyperplanes) -> Float[Tensor, "n K"]:
    """What asinh is taken of: v_k = scale_k asinh(argument_k)."""
    return padded_product(lifted, planes.normals.T, tile_height(len(planes.scales)))


def _noisy(logits: Float[Tensor, "n K"], gumbel: Noise | None, tile: slice) -> Float[Tensor, "n K"]:
    if gumbel is None:
        return logits
    drawn = noise.gumbel(gumbel.seed, gumbel.step, gumbel.keys[tile], draws=logits.shape[1])
    return logits + drawn.to(logits.dtype)


class _ThroughWeights(Function):
    """`chosen` going forward; going back its gradient, and through p that of x and the planes (see the class)."""

    @staticmethod
    def forward(
        ctx: Any, chosen: Tensor, x: Tensor, normals: Tensor, scales: Tensor, table: Tensor, soft: _Soft
    ) -> Tensor:
        ctx.save_for_backward(x, normals, scales, table)
        ctx.soft = soft
        return chosen.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        x, normals, scales, table = ctx.saved_tensors
        planes, soft, height = Hyperplanes(normals, scales), ctx.soft, tile_height(len(table))
        to_x, to_normals, to_scales = torch.empty_like(x), torch.zeros_like(normals), torch.zeros_like(scales)
        with exact_products(x.device):
            for tile in _tiles(x, len(table)):
                with torch.enable_grad():
                    leaf = x[tile].detach().requires_grad_()
                    point = _lifted(leaf, soft.curvature)
                arguments = _arguments(point.detach(), planes)
                distances = arguments.asinh()
                noisy = _noisy(scales * distances, soft.gumbel, tile)
                noisy -= noisy.amax(-1, keepdim=True)  # before the division, which may overflow where it is by little
                p = noisy.div_(soft.temperature).softmax(-1)
                along = padded_product(gradient[tile], table.T, height)
                to_logits = p * (along - (p * along).sum(-1, keepdim=True)) / soft.temperature
                to_scales += (to_logits * distances).sum(0)
                to_arguments = to_logits * scales / torch.sqrt(1 + arguments.square())
                to_normals += to_arguments.T @ point.detach()
                (to_x[tile],) = torch.autograd.grad(point, leaf, padded_product(to_arguments, normals, height))
        return gradient, to_x, to_normals, to_scales, None, None
