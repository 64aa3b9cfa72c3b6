from functools import partial
from itertools import product

from tests.vqcore.quantizers.cases import D, K
from vqcore.estimators import rotate, straight_through
from vqcore.quantizers import ResidualQuantizer

CASES = {
    f"{'shared' if shared else 'own'}-{decay}": partial(
        ResidualQuantizer, K, D, levels=3, shared=shared, decay=decay, estimator=estimator, revive_below=1.0
    )
    for shared, (decay, estimator) in product((False, True), ((0.9, straight_through), (None, rotate)))
} | {
    f"{'shared' if shared else 'sizes'}-dropout-{decay}": partial(
        ResidualQuantizer,
        K if shared else (K, 8, 4),
        D,
        levels=3,
        shared=shared,
        decay=decay,
        revive_below=1.0,
        dropout=0.5,
    )
    for shared, decay in product((False, True), (0.9, None))
}
