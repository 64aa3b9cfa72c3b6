"""Small instances of every quantizer for the contract tests: one module here for each in vqcore/quantizers.

Each module holds `CASES: dict[str, Callable[..., nn.Module]]`. A callable takes `reduce` and `seed`, and returns a
quantizer of D = 4 and at most 16 codes a level that is seeded without data, with revival wherever there is any. One
that also takes `seeding` is tried with seedings from data too. The first case of a module runs what takes long: the
400 steps of tests/contracts/workers.py.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import nn

K, D = 16, 4


def all_cases() -> dict[str, Callable[..., nn.Module]]:
    """`module-case` -> its callable, found by module name."""
    found: dict[str, Callable[..., nn.Module]] = {}
    for module in pkgutil.iter_modules(__path__):
        cases: dict[str, Any] = importlib.import_module(f"{__name__}.{module.name}").CASES
        found |= {f"{module.name}-{name}": make for name, make in cases.items()}
    return found
