"""Codebook: K vectors, the moving counts and sums they are read from, and whether they hold anything yet."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor, nn

_STATE = ("vectors", "counts", "sums", "seeded", "step")


def unit(x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """x / |x| along the last dimension; a zero vector has no direction, stays 0 and passes no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, torch.inf)


def known_finite(x: Float[Tensor, "N D"]) -> bool:
    """Whether x holds no NaN and no infinity, where that costs no synchronisation and no graph: else False. One pass
    that writes nothing: what is not finite stays so in every sum (a sum that overflows gives False too)."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and math.isfinite(x.detach().sum())


def finite_rows(x: Float[Tensor, "N D"]) -> Bool[Tensor, " N"]:
    """Which rows hold no NaN and no infinity."""
    if known_finite(x):
        return torch.ones(len(x), dtype=torch.bool)
    return (x - x).sum(-1) == 0  # 30 times faster than isfinite().all(-1): inf - inf and nan - nan are nan


def known_all(keep: Bool[Tensor, " N"]) -> bool:
    """Whether all of `keep` hold, where that costs no synchronisation and no graph: else False."""
    return keep.device.type == "cpu" and not torch.compiler.is_compiling() and bool(keep.all())


def only(keep: Bool[Tensor, " N"], x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """`x` where `keep` says so, else 0 without a gradient, also for a NaN; `x` itself where all are kept, on CPU."""
    if known_all(keep):
        return x  # a broadcast `where` costs ten ordinary passes over x
    return torch.where(keep.unsqueeze(-1), x, 0.0)


def pick(vectors: Float[Tensor, "K D"], codes: Int64[Tensor, " N"]) -> Float[Tensor, "N D"]:
    """`vectors[codes]`, 0 where a code is negative. Unchecked and free of host synchronisation; differentiable."""
    return only(codes >= 0, vectors.index_select(0, codes.clamp(min=0)))


def record(book: Any, counts: Float64[Tensor, " K"], decay: float) -> Float64[Tensor, ""]:
    """Let the global `counts` of one update enter `book.counts`, and count the update; counts of 0 everywhere change
    nothing. Returns the weight that the update has in the moving average: 1 - decay, or 0."""
    some = counts.sum() > 0
    fresh = (1.0 - decay) * some.double()  # bool times float would be float32
    book.step += some
    torch.where(some, counts, book.last_counts, out=book.last_counts)
    book.counts.lerp_(counts, fresh)
    return fresh


def checked(codes: Int[Tensor, "*shape"], num_codes: int, device: torch.device) -> Int64[Tensor, " N"]:
    """`codes` as flat int64 on `device`. Raises ValueError where one is neither in [0, num_codes) nor -1."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}; they must be integers in [0, {num_codes}), or -1 for masked")
    flat = codes.reshape(-1).to(device, torch.int64)
    if flat.numel():
        low, high = (int(bound) for bound in torch.aminmax(flat))
        if low < -1 or high >= num_codes:
            raise ValueError(
                f"codes run from {low} to {high}; this codebook has codes 0 to {num_codes - 1} "
                "(-1 = masked). Were they made with another codebook?"
            )
    return flat


def precise(fn: Callable[[Tensor], Tensor], state: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of Module._apply (`.to`, `.half`, `.cuda` ...), nothing going below float32; `state` stays float64."""
    exact = {id(tensor) for tensor in state}

    def keep_precision(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        low = moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32
        if low or (id(tensor) in exact and moved.dtype != torch.float64):
            return tensor.to(moved.device)
        return moved

    return keep_precision


def _off_sphere(vectors: Float[Tensor, "K D"]) -> bool:
    """Whether some vector is neither 0 (not seeded) nor of length 1."""
    length = torch.linalg.vector_norm(vectors.double(), dim=-1)
    return not vectors.is_meta and bool(((length != 0) & ((length - 1).abs() > 0.01)).any())


class Codebook(nn.Module):
    """K vectors of D dimensions with the state of their exponential moving average.

    `unit_norm` keeps the vectors on the unit sphere (cosine). `learned` makes `vectors` a parameter for an optimiser;
    such a book has counts (they decide which codes are dead) but no sums: [0, D]. The parameter of a learned unit-norm
    book drifts off the sphere between steps; `readable()` is what assignment and look-up use.

    `vectors` follows `.to(dtype)` but never goes below float32; counts and sums are float64 whatever is asked of the
    module around them, because float32 sums make near-duplicate codes drift apart between workers.
    A book starts unseeded: zeros that nothing may read.
    """

    vectors: Tensor
    counts: Tensor
    sums: Tensor
    seeded: Tensor
    step: Tensor
    last_counts: Tensor

    def __init__(self, num_codes: int, code_dim: int, *, unit_norm: bool = False, learned: bool = False) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.unit_norm = unit_norm
        self.learned = learned
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        vectors = torch.zeros(num_codes, code_dim, dtype=dtype)
        if learned:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(0 if learned else num_codes, code_dim, dtype=torch.float64))
        self.register_buffer("seeded", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("last_counts", torch.zeros(num_codes, dtype=torch.float64), persistent=False)
        self.revived: Bool[Tensor, " K"] | None = None
        """Which codes the newest update revived; None where it revived none."""
        self._known_seeded = False  # a book never becomes unseeded except by loading; spares a host sync a step

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vectors: float32, or float64 in the float64 test mode."""
        return self.vectors.dtype

    @property
    def is_seeded(self) -> bool:
        if not self._known_seeded:
            self._known_seeded = bool(self.seeded)
        return self._known_seeded

    def extra_repr(self) -> str:
        return (
            f"num_codes={self.num_codes}, code_dim={self.code_dim}, unit_norm={self.unit_norm}, learned={self.learned}"
        )

    def readable(self) -> Float[Tensor, "K D"]:
        """The vectors as assignment and look-up see them: detached, on the unit sphere where `unit_norm` says so."""
        vectors = self.vectors.detach()
        return unit(vectors) if self.learned and self.unit_norm else vectors

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Vectors of `codes` (any integer type); -1 gives 0.

        Raises ValueError for other codes outside [0, K) or a type that is not integer, RuntimeError while unseeded.
        """
        self.require_seeded()
        flat = checked(codes, self.num_codes, self.vectors.device)
        return pick(self.readable(), flat).reshape(*codes.shape, self.code_dim)

    def require_seeded(self) -> None:
        """Raise RuntimeError where there is nothing to read yet."""
        if not self.is_seeded:
            raise RuntimeError(
                f"this codebook of {self.num_codes} codes was never seeded: call seed(batches), set_vectors(v), "
                "or forward in training mode until there are enough vectors"
            )

    @torch.no_grad()
    def set_vectors(self, vectors: Float[Tensor, "K D"], count: float = 1.0) -> None:
        """Replace the codebook; every count becomes `count` and every sum count x vector, so that the next update moves
        on from these vectors (not from what the sums held before: lucidrains/vector-quantize-pytorch forgets them).

        A unit-norm book normalises what it is given. Raises ValueError on another shape or a non-finite value.
        """
        wanted = (self.num_codes, self.code_dim)
        if tuple(vectors.shape) != wanted:
            raise ValueError(f"vectors are {tuple(vectors.shape)}; this codebook holds {wanted} (num_codes, code_dim)")
        given = vectors.detach().to(self.vectors)
        if not bool(torch.isfinite(given).all()):
            raise ValueError("vectors hold a NaN or an infinity; every code must be finite")
        self.vectors.copy_(unit(given) if self.unit_norm else given)
        self.counts.fill_(count)
        if not self.learned:
            self.sums.copy_(self.vectors.double() * count)
        self.seeded.fill_(True)
        self._known_seeded = True
        self.revived = None

    @torch.no_grad()
    def ema_update(
        self, counts: Float64[Tensor, " K"], sums: Float64[Tensor, "K D"] | None, decay: float, eps: float
    ) -> None:
        """One update from the counts and sums of the *global* batch (van den Oord et al. 2017, appendix A.1).

            c <- d c + (1 - d) n_k    s <- d s + (1 - d) sum x    v_k = s_k / c'_k    c'_k = (c_k + eps) n / (n + K eps)

        with n = sum of c. c' is not written back, and only codes with n_k > 0 are read out: the others keep their bits.
        Global counts of 0 change nothing at all, without asking the device whether they were 0.
        `sums` is None where the book is learned.
        """
        fresh = record(self, counts, decay)
        self.revived = None
        if sums is None:
            return
        self.sums.lerp_(sums, fresh)
        total = self.counts.sum()
        smoothed = (self.counts + eps) * (total / (total + self.num_codes * eps))
        moved = (counts > 0).unsqueeze(-1)
        read = self.sums / smoothed.unsqueeze(-1)
        if self.unit_norm:
            read = unit(read)
            moved = moved & (read != 0).any(-1, keepdim=True)  # sums that cancel have no direction to move to
        torch.where(moved, read.to(self.vectors.dtype), self.vectors, out=self.vectors)

    @torch.no_grad()
    def revive(self, codes: Int64[Tensor, " M"], rows: Float[Tensor, "M D"], count: float) -> None:
        """Put `rows` in the place of dead `codes`, with `count` and sum count x row."""
        self.vectors[codes] = rows.to(self.vectors)
        self.counts[codes] = count
        if not self.learned:
            self.sums[codes] = self.vectors[codes].double() * count
        elif self.vectors.grad is not None:
            self.vectors.grad[codes] = 0.0  # it was taken at the place the code has just left
        self.revived = torch.zeros_like(self.counts, dtype=torch.bool).index_fill_(0, codes, True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Codebook":
        super()._apply(precise(fn, (self.counts, self.sums, self.last_counts)), recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Refuse a state of another shape whole, instead of copying the tensors that happen to fit."""
        missing, unexpected, errors = rest
        mismatches = [
            f"{prefix}{name} has shape {tuple(state_dict[prefix + name].shape)} in the state and "
            f"{tuple(getattr(self, name).shape)} in this codebook of {self.num_codes} x {self.code_dim}"
            for name in _STATE
            if prefix + name in state_dict and state_dict[prefix + name].shape != getattr(self, name).shape
        ]
        vectors = state_dict.get(prefix + "vectors")
        if self.unit_norm and not self.learned and vectors is not None and _off_sphere(vectors):
            mismatches.append(f"{prefix}vectors are not of length 1: this codebook is cosine, the state is not")
        if mismatches:
            errors.extend(mismatches)
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        # Asked here, so that a compiled forward finds no question to the device in its way.
        self._known_seeded = not self.seeded.is_meta and bool(self.seeded)
        self.revived = None
