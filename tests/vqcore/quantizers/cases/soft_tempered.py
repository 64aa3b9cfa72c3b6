from functools import partial

from tests.vqcore.quantizers.cases import D, K
from vqcore.quantizers import TemperedQuantizer

CASES = {
    "source": partial(TemperedQuantizer, K, D, decay=0.9),
    "standard": partial(TemperedQuantizer, K, D, decay=0.9, ema="standard", revive_below=1.0),
    "relative": partial(TemperedQuantizer, K, D, decay=0.9, ema="standard", relative=True, top_k=3),
}
