"""Vector quantization whose codebook is a learned linear map of a frozen basis (AminoAseed)."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from vqcore import assign, losses, noise
from vqcore.assign import exact_products
from vqcore.codebook import only, pick, precise
from vqcore.derived import DerivedCodebook, refuse_misfit
from vqcore.estimators import straight_through
from vqcore.quantizers import from_data
from vqcore.quantizers.arguments import check_estimator, check_seeding, check_sizes, check_weights
from vqcore.quantizers.contract import Quantized, VectorBatch, per_element, quantized
from vqcore.quantizers.rows import full_precision, rows_of
from vqcore.quantizers.updates import Updates
from vqcore.reduction import Reduction
from vqcore.seeding import Offer, Seeding
from vqcore.update import Rule

Estimator = Callable[[Tensor, Tensor], Tensor]

_MAP = 1
"""The `stream` of noise.shared_uniform that the linear map is drawn from."""


class ReparameterizedQuantizer(nn.Module):
    """The codebook of AminoAseed (Yuan et al. 2025, arXiv 2503.00089; the maths is that of the authors' code):

        Q = C W^T + 1 b^T        C [K, D] frozen, W [D, D] and b [D] learned by gradient
        loss = |sg(x) - q|^2 + commitment_weight |x - sg(q)|^2        q the row of Q nearest to x

    so that *every* code moves on every step, also those that no vector chose. No moving average, no revival, no entropy
    term. Codes, look-up and `codebook.vectors` are rows of Q, not of C.

    Shapes: x [..., D] of any leading dimensions, mask and keys [...]. Both losses are means over D and over the valid
    vectors of all workers; the source averages over padding too, which lets it pull the map.

    Arguments:
        num_codes, code_dim: K and D (512 and 1024 in the source).
        commitment_weight: of |x - sg(q)|^2 (0.25 in the source).
        estimator: (x, code vectors) -> output with the gradient wanted; see vqcore.estimators.
        seeding: of the basis. None draws it from N(0, 1) by `seed`, at once, as the paper is reported to do: rows are
            nearly orthogonal where D is large. vqcore.seeding.random_rows is what the authors' code does (K encoder
            outputs of the first batch; it makes up for missing ones with noisy copies, and this refuses). Either way
            the codebook starts at the map of the basis, not at the basis.
        reduce: sums a float64 tensor over workers in place; None: torch.distributed's default group if there is one at
            the call, else nothing. One reduce a training step, of the counts. Never called in eval mode.
        seed: of the basis and of W and b, which start as those of nn.Linear: U(-1/sqrt(D), 1/sqrt(D)), equal on all
            workers.

    Raises ValueError for arguments outside these.
    """

    discrete = True
    accumulates = True

    basis: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
        estimator: Estimator = straight_through,
        seeding: Seeding | None = None,
        reduce: Reduction | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(num_codes=num_codes, code_dim=code_dim)
        check_estimator(estimator)
        check_seeding(seeding)
        check_weights(commitment_weight=commitment_weight)
        rule = Rule(decay=None, revive_below=0.0, eps=0.0, seed=seed)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.commitment_weight = commitment_weight
        self.estimator = estimator
        self.seeding = seeding
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        drawn = noise.shared_uniform(seed, 0, code_dim * (code_dim + 1), stream=_MAP)
        drawn = ((2.0 * drawn - 1.0) / math.sqrt(code_dim)).float().to(dtype)
        self.weight = nn.Parameter(drawn[code_dim:].reshape(code_dim, code_dim).clone())
        self.bias = nn.Parameter(drawn[:code_dim].clone())
        self.register_buffer("basis", torch.zeros(num_codes, code_dim, dtype=dtype))
        self.codebook = DerivedCodebook(num_codes, code_dim, self._derive)
        self._updates = Updates([self.codebook], [rule], reduce, needed=num_codes, seed=self._seed_from)
        if seeding is None:
            self.basis.copy_(from_data.normal_vectors(num_codes, code_dim, seed))
            self.codebook.mark_seeded()

    def extra_repr(self) -> str:
        name = getattr(self.estimator, "__name__", repr(self.estimator))
        return f"commitment_weight={self.commitment_weight}, estimator={name}"

    @property
    def seeded(self) -> bool:
        """Whether there is a basis; forwards without one gather in training and raise in eval."""
        return self.codebook.is_seeded

    @property
    def last_counts(self) -> tuple[Tensor, ...]:
        """One float64 [K]: global number of vectors per code in the newest update; zeros before the first."""
        return (self.codebook.last_counts,)

    def revived_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Always empty: no code is ever without a gradient."""
        return []

    def forward(
        self,
        x: Float[Tensor, "*shape D"],
        mask: Bool[Tensor, "*shape"] | None = None,
        keys: Int64[Tensor, "*shape"] | None = None,
    ) -> Quantized:
        """Quantize `x`. Output vectors have the codebook's type (float32) also under autocast.

        The codebook is computed once. `keys` matter to seeding alone. In training all workers must call it equally
        often. Raises as VectorQuantizer.forward.
        """
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.weight.dtype)
            if self.training and not self.seeded:
                return from_data.gather(rows, x, keys, self.codebook, self._updates)
            self.codebook.require_seeded()
            vectors = self.codebook.vectors
            codes = assign.nearest(rows.x.detach(), vectors.detach()).masked_fill(~rows.valid, -1)
            chosen = pick(vectors, codes)
            output = chosen.detach()
            squared = losses.squared_error(rows.x, output)
            objective = self.commitment_weight * squared + losses.squared_error(rows.x.detach(), chosen)
            count, world = rows.valid.sum(), 1
            if self.training:
                statistics = self._updates.begin()
                statistics[0].add(rows.x, codes, None)
                count, world = self._updates.end(statistics, rows.valid)
                output = only(rows.valid, self.estimator(rows.x, output))
            loss = (objective * per_element(count, world, self.code_dim)).to(rows.x.dtype)
        return quantized(x, rows, output, codes, loss, squared)

    @torch.no_grad()
    def assign(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Int64[Tensor, "*shape"]:
        """Codes of `x`; -1 where masked or non-finite. Raises RuntimeError while unseeded."""
        self.codebook.require_seeded()
        with full_precision(x.device):
            rows = rows_of(x, mask, self.code_dim, self.weight.dtype)
            codes = assign.nearest(rows.x, self.codebook.readable())
            return codes.masked_fill(~rows.valid, -1).reshape(x.shape[:-1])

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Vectors of `codes`, rows of Q; -1 gives 0, others outside [0, K) raise ValueError."""
        return self.codebook.look_up(codes)

    def accumulate(self, count: int | None = None) -> AbstractContextManager[None]:
        """Counts are taken once, on exit; the losses of the block add up. See VectorQuantizer.accumulate."""
        return self._updates.accumulate(count, self.training)

    def seed(self, batches: Iterable[VectorBatch]) -> str:
        """Set the basis from this worker's `batches`, all workers together. Returns and raises as
        VectorQuantizer.seed."""
        return self._seed_from(from_data.offers_of(batches, self.codebook, self._updates.reduce))

    def _seed_from(self, offers: Iterable[Offer]) -> str:
        if self.seeding is None:
            raise RuntimeError(
                "this quantizer drew its basis from N(0, 1) (seeding=None); build it with "
                "seeding=vqcore.seeding.random_rows to take the basis from data"
            )
        vectors, said = from_data.vectors_from(offers, self.basis, "euclidean", self._updates, self.seeding)
        self.basis.copy_(vectors)
        self.codebook.mark_seeded()
        self._updates.forget()
        return f"the basis of {said}"

    def _derive(self) -> Float[Tensor, "K D"]:
        return _Map.apply(self.basis, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ReparameterizedQuantizer":
        super()._apply(precise(fn, ()), recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        refuse_misfit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Map(Function):
    """C W^T + 1 b^T. torch's own would take the gradient of W in bfloat16 where `backward` is called under autocast."""

    @staticmethod
    def forward(ctx: Any, basis: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        with exact_products(basis.device):
            return torch.addmm(bias, basis, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        (basis,) = ctx.saved_tensors
        with exact_products(basis.device):
            return None, gradient.T @ basis, gradient.sum(0)
