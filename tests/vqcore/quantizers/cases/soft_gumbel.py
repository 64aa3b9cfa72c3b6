from functools import partial

from tests.vqcore.quantizers.cases import D, K
from vqcore.quantizers import GumbelQuantizer

CASES = {
    "source": partial(GumbelQuantizer, K, D),
    "cooler": partial(GumbelQuantizer, K, D, temperature=1.0, init_std=1.0),
}
