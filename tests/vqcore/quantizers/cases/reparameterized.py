from functools import partial

from tests.vqcore.quantizers.cases import D, K
from vqcore.estimators import rotate, straight_through
from vqcore.quantizers import ReparameterizedQuantizer

CASES = {
    estimator.__name__: partial(ReparameterizedQuantizer, K, D, estimator=estimator)
    for estimator in (straight_through, rotate)
}
