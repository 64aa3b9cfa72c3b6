from functools import partial
from itertools import product

from tests.vqcore.quantizers.cases import D, K
from vqcore.estimators import rotate, straight_through
from vqcore.quantizers import VectorQuantizer

CASES = {
    f"{metric}-{decay}-{estimator.__name__}": partial(
        VectorQuantizer, K, D, metric=metric, decay=decay, estimator=estimator, revive_below=1.0
    )
    for metric, decay, estimator in product(("euclidean", "cosine"), (0.9, None), (straight_through, rotate))
}
