"""Random numbers as a function of where they are used, not of who draws them.

A draw is a hash of (seed, step, key, level, head, draw), or of (seed, step, index) where all workers share it. Any
number of workers, any split and any order of rows therefore see the same numbers, and a checkpoint keeps only the step.
The hash is SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): every
coordinate is added times its own odd constant and passed through the finaliser (Stafford's mix 13) before the next one.
It is integer arithmetic, so all devices draw the same integers. Checkpoints depend on it: it never changes.
A step may be given as the tensor that counts it, which spares a device the wait for a Python number.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Step = int | Int64[Tensor, ""]

_WORD = 2**64
_GOLDEN = 0x9E3779B97F4A7C15
# Draws per row, per worker and shared ones never meet: each kind starts from a state of its own.
_ROWS, _RACE, _SHARED = 1, 2, 3
# keys=None: the worker's number stands above this bit, so its positions never reach another worker's.
_POSITION_BITS = 40


def uniform(
    seed: int, step: Step, keys: Int64[Tensor, " N"], *, level: int = 0, head: int = 0, draws: int = 1
) -> Float[Tensor, "N draws"]:
    """float64 uniforms strictly inside (0, 1) with 53 random bits; draw j of a row does not depend on `draws`.

    Raises:
        ValueError: keys that are not one dimension of int64, or a negative number of draws.
    """
    _check_keys(keys)
    if draws < 0:
        raise ValueError(f"draws is {draws}; it must be 0 or more")
    rows = _absorb(_state(_ROWS, seed, step, level, head), keys)
    return _unit(_absorb(rows.unsqueeze(1), torch.arange(draws, device=keys.device)))


def normal(
    seed: int, step: Step, keys: Int64[Tensor, " N"], *, level: int = 0, head: int = 0, draws: int = 1
) -> Float[Tensor, "N draws"]:
    """float64 standard normals: the quantile function at `uniform` of the same arguments, so one uniform each."""
    return torch.special.ndtri(uniform(seed, step, keys, level=level, head=head, draws=draws))


def gumbel(
    seed: int, step: Step, keys: Int64[Tensor, " N"], *, level: int = 0, head: int = 0, draws: int = 1
) -> Float[Tensor, "N draws"]:
    """float64 standard Gumbel variables, -log(-log u): added to logits, their argmax is a draw from the softmax."""
    return uniform(seed, step, keys, level=level, head=head, draws=draws).log_().neg_().log_().neg_()


def choose(weights: Float[Tensor, "N K"], u: Float[Tensor, "N draws"]) -> Int64[Tensor, "N draws"]:
    """Indices drawn with probability weight / (sum of the row), each by its own uniform u: the inverse of the
    cumulative sum, in float64. Draw j depends on its row and u[:, j] alone; an index of weight 0 is never drawn.

    Weights are 0 or more, with something above 0 in every row; other rows get some index.
    """
    reached = weights.double().cumsum(-1)
    # u of at most 1 - 2^-53 times the total never rounds up to it, so only a NaN gets as far as the clamp.
    found = torch.searchsorted(reached, u.double() * reached[:, -1:], right=True)
    return found.clamp_(max=weights.shape[1] - 1)


def shared_uniform(seed: int, step: Step, count: int, *, stream: int = 0) -> Float[Tensor, " count"]:
    """float64 uniforms inside (0, 1) that every worker draws alike; `stream` tells uses in one step apart. They are on
    the device of `step`, on the CPU where it is a number.

    Raises:
        ValueError: a negative count.
    """
    if count < 0:
        raise ValueError(f"count is {count}; it must be 0 or more")
    state = _state(_SHARED, seed, step, stream)
    return _unit(_absorb(state, torch.arange(count, device=state.device if isinstance(state, Tensor) else None)))


def race(
    seed: int,
    step: int,
    keys: Int64[Tensor, " N"],
    weights: Float[Tensor, " N"] | None = None,
    *,
    level: int = 0,
    stream: int = 0,
) -> Float[Tensor, " N"]:
    """Finishing times -log(u) / weight, float64: the k smallest are k rows drawn without replacement by weight.

    Needs no global order: every worker races its own rows and the smallest times of all are the global draw
    (Efraimidis & Spirakis 2006, in exponential form). Weight 0 gives +inf: such a row never wins against another.

    Raises:
        ValueError: keys that are not one dimension of int64, or weights of another shape.
    """
    _check_keys(keys)
    times = _unit(_absorb(_state(_RACE, seed, step, level, stream), keys)).log_().neg_()
    if weights is None:
        return times
    if weights.shape != keys.shape:
        raise ValueError(f"{tuple(weights.shape)} weights for {tuple(keys.shape)} keys: each key takes one weight")
    return times / weights.to(torch.float64)


def default_keys(
    count: int, rank: int, device: torch.device | str | None = None, *, start: int = 0
) -> Int64[Tensor, " count"]:
    """Keys for keys=None: (worker, position) in one number, never equal between workers; positions begin at `start`.

    Synchronised, but not the same for another number of workers. They are all negative, so they also stay apart from
    row ids.

    Raises:
        ValueError: a position or worker beyond the range (2^40 positions, 2^22 workers).
    """
    end = start + count
    if not 0 <= start <= end <= 2**_POSITION_BITS or not 0 <= rank < 2**22:
        raise ValueError(
            f"positions {start} to {end} and rank {rank} must lie in [0, 2^{_POSITION_BITS}] and [0, 2^22)"
        )
    return torch.arange(start, end, device=device) - ((rank + 1) << _POSITION_BITS)


def _check_keys(keys: Tensor) -> None:
    if keys.dtype != torch.int64 or keys.ndim != 1:
        raise ValueError(f"keys are {keys.dtype} of shape {tuple(keys.shape)}; they must be int64 of shape [N]")


def _state(*coordinates: Step) -> Step:
    """The hash of single numbers, as an int64: the same rounds as `_absorb`, in Python's integers up to a tensor."""
    state, hashed = 0, None
    for coordinate in coordinates:
        if isinstance(coordinate, Tensor):
            hashed = _absorb(_signed(state) if hashed is None else hashed, coordinate)
        elif hashed is not None:
            hashed = _absorb(hashed, torch.full_like(hashed, coordinate))
        else:
            state = (state + coordinate * _GOLDEN + _GOLDEN) % _WORD
            state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
            state = (state ^ (state >> 27)) * 0x94D049BB133111EB % _WORD
            state ^= state >> 31
    return _signed(state) if hashed is None else hashed


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word


def _absorb(state: Int64[Tensor, "..."] | int, coordinate: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """One round over tensors. int64 products wrap in torch, which is arithmetic modulo 2^64."""
    # In place and with one buffer: at millions of draws fresh memory for every operation costs more than arithmetic.
    word = (coordinate * _signed(_GOLDEN)).add_(_signed(_GOLDEN)) + state
    spare = torch.empty_like(word)
    word.bitwise_xor_(_shift_right(word, 30, spare)).mul_(_signed(0xBF58476D1CE4E5B9))
    word.bitwise_xor_(_shift_right(word, 27, spare)).mul_(_signed(0x94D049BB133111EB))
    return word.bitwise_xor_(_shift_right(word, 31, spare))


def _shift_right(word: Int64[Tensor, "..."], bits: int, out: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Logical shift: torch's own copies the sign bit into the top."""
    return torch.bitwise_right_shift(word, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _unit(word: Int64[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The upper 53 bits as a multiple of 2^-53 below 1; 0 becomes half a step, because logarithms are taken of it.

    `word` is used up.
    """
    return _shift_right(word, 11, word).to(torch.float64).mul_(2.0**-53).clamp_min_(2.0**-54)
