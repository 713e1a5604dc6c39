"""What a merge computes: its parameters, the selection of heads, and the sums behind it.

A file with a method of your own imports from here; docs/add-a-method.md shows one.
"""

from hsa.findings import Findings
from hsa.methods.base import KEEP, Block, Contract, Method, ModelRole, NotFiniteSums, Treatment
from hsa.methods.coefficients import Coefficients, LinearCombination
from hsa.methods.model_method import ModelMethod, ModelSettings, WeightedSettings, weights_setting
from hsa.methods.settings import Settings, setting
from hsa.methods.sums import block_sums, total
from hsa.methods.tensors import CardText, Outcome, Summary, TensorRecord, TensorTask

__all__ = [
    "KEEP",
    "Block",
    "CardText",
    "Coefficients",
    "Contract",
    "Findings",
    "LinearCombination",
    "Method",
    "ModelMethod",
    "ModelRole",
    "ModelSettings",
    "NotFiniteSums",
    "Outcome",
    "Settings",
    "Summary",
    "TensorRecord",
    "TensorTask",
    "Treatment",
    "WeightedSettings",
    "block_sums",
    "setting",
    "total",
    "weights_setting",
]
