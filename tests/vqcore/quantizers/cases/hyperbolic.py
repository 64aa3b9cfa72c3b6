from functools import partial

from tests.vqcore.quantizers.cases import D, K
from vqcore.quantizers import HyperbolicQuantizer

CASES = {
    f"{name}-{curvature}": partial(HyperbolicQuantizer, K, D, normalise=normalise, curvature=curvature)
    for name, normalise, curvature in (("log_0", True, 0.3), ("ports", False, 1.0))
}
