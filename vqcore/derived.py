"""DerivedCodebook: K vectors that are a function of their quantizer's parameters, such as a linear map of a basis."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor, nn

from vqcore.codebook import checked, pick, precise, record


def refuse_misfit(quantizer: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """Raise RuntimeError, before anything is copied, where `state` holds a tensor of another shape than `quantizer` and
    its codebook do. To be called from `_load_from_state_dict` of the quantizer: its parameters and the codebook's
    counts belong together, and torch alone would copy those that happen to fit."""
    misfits = [
        f"{prefix}{name} has shape {tuple(state[prefix + name].shape)} in the state and {tuple(own.shape)} here"
        for name, own in quantizer.state_dict().items()
        if prefix + name in state and state[prefix + name].shape != own.shape
    ]
    if misfits:
        raise RuntimeError(f"this state belongs to a quantizer of other sizes: {'; '.join(misfits)}")


class DerivedCodebook(nn.Module):
    """A codebook without vectors of its own; to everyone else it reads like `Codebook`.

    `derive` is a bound method of the quantizer that owns the parameters: () -> vectors [K, D] in float32 or better,
    with their gradient. There is no moving average and no revival: a code cannot move without moving others. Counts
    decay as those of a learned codebook do and only say what is used.
    """

    counts: Tensor
    step: Tensor
    last_counts: Tensor
    seeded: Tensor

    unit_norm = False
    learned = True
    revived = None

    def __init__(self, num_codes: int, code_dim: int, derive: Callable[[], Float[Tensor, "K D"]]) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.code_dim = code_dim
        self._derive = derive
        self.register_buffer("counts", torch.ones(num_codes, dtype=torch.float64))
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64))
        self.register_buffer("seeded", torch.tensor(False))
        self.register_buffer("last_counts", torch.zeros(num_codes, dtype=torch.float64), persistent=False)
        self._known_seeded = False

    @property
    def vectors(self) -> Float[Tensor, "K D"]:
        """Computed at every access, differentiable."""
        return self._derive()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the vectors: float32, or float64 in the float64 test mode. Derives them to find out."""
        return self.readable().dtype

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}"

    def readable(self) -> Float[Tensor, "K D"]:
        """The vectors as assignment and look-up see them: detached."""
        with torch.no_grad():
            return self._derive()

    @property
    def is_seeded(self) -> bool:
        if not self._known_seeded:
            self._known_seeded = bool(self.seeded)
        return self._known_seeded

    def mark_seeded(self) -> None:
        """Called by the quantizer once its parameters hold something that may be read."""
        self.seeded.fill_(True)
        self._known_seeded = True

    def require_seeded(self) -> None:
        """Raise RuntimeError where there is nothing to read yet."""
        if not self.is_seeded:
            raise RuntimeError(
                f"this codebook of {self.num_codes} codes was never seeded: call seed(batches), "
                "or forward in training mode until there are enough vectors"
            )

    def look_up(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Vectors of `codes` (any integer type); -1 gives 0. Errors as `Codebook.look_up`."""
        self.require_seeded()
        flat = checked(codes, self.num_codes, self.counts.device)
        return pick(self.readable(), flat).reshape(*codes.shape, self.code_dim)

    def set_vectors(self, vectors: Float[Tensor, "K D"], count: float = 1.0) -> None:
        """Refused: these vectors follow from parameters, and an arbitrary codebook is not in their reach."""
        raise RuntimeError(
            "this codebook is derived from its quantizer's parameters, so its vectors cannot be set; "
            "set the parameters, or use VectorQuantizer for a codebook of your own"
        )

    def ema_update(
        self, counts: Float64[Tensor, " K"], sums: Float64[Tensor, "K D"] | None, decay: float, eps: float
    ) -> None:
        """Keep the global counts of one update; the vectors are an optimiser's, so there are no sums."""
        record(self, counts, decay)

    def revive(self, codes: Int64[Tensor, " M"], rows: Float[Tensor, "M D"], count: float) -> None:
        """Refused, as `set_vectors` is."""
        raise RuntimeError("the codes of a derived codebook cannot be revived one by one; use revive_below=0")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DerivedCodebook":
        super()._apply(precise(fn, (self.counts, self.last_counts)), recurse)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._known_seeded = False
