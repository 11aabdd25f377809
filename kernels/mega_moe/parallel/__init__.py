"""The experts of one layer over several ranks as one operation: dispatch, expert products, combine.

Every rank has its own tokens, any number of them, and some of the experts. The result of a token is that of `mega_moe`
with all experts on one rank, bit for bit where the product of an expert gives a row the same bits in any batch.
"""

from dsv4_kernels.mega_moe.parallel.exchange import ExpertParallel, Traffic
from dsv4_kernels.mega_moe.parallel.expert_map import ExpertMap

__all__ = ["ExpertMap", "ExpertParallel", "Traffic"]
