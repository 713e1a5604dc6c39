"""The formulas in plain torch: the oracle of the tests. It imports nothing from the packages that it checks."""

from hsa.reference.hsa import MergedTensor as MergedTensor
from hsa.reference.hsa import head_scores as head_scores
from hsa.reference.hsa import keep_count as keep_count
from hsa.reference.hsa import layer_coefficient as layer_coefficient
from hsa.reference.hsa import margin as margin
from hsa.reference.hsa import merge_other as merge_other
from hsa.reference.hsa import merge_tensor as merge_tensor
from hsa.reference.hsa import select_heads as select_heads
