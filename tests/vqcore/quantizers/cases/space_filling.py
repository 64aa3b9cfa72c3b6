from functools import partial

from tests.vqcore.quantizers.cases import D, K
from vqcore.quantizers import SpaceFillingQuantizer

CASES = {
    "alone": partial(SpaceFillingQuantizer, K, D),
    "joint": partial(SpaceFillingQuantizer, K, D, joint=True),
}
