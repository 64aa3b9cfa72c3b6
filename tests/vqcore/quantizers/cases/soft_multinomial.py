from functools import partial

from tests.vqcore.quantizers.cases import D, K
from vqcore.quantizers import MultinomialQuantizer

CASES = {
    "source": partial(MultinomialQuantizer, K, D, draws=3),
    "source-revival": partial(MultinomialQuantizer, K, D, draws=3, revive_below=1.0),
    "standard": partial(MultinomialQuantizer, K, D, draws=3, ema="standard", revive_below=1.0),
}
