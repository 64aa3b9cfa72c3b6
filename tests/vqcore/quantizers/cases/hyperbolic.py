from functools import partial

from tests.vqcore.quantizers.cases import D, K
from vqcore.quantizers import HyperbolicQuantizer

# The first case also trains for 400 steps. At c = 0.3 that toy turns chaotic after 200 (1e-16 becomes 1e-4 by 400, for
# any order of the sums), so it would show nothing of workers.
CASES = {
    f"{name}-{curvature}": partial(HyperbolicQuantizer, K, D, normalise=normalise, curvature=curvature)
    for name, normalise, curvature in (("ports", False, 1.0), ("log_0", True, 0.3))
}
