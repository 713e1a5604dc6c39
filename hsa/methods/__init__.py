"""Merge methods: their settings, the selection of heads, and the sums behind their decisions.

To define a method of your own in a file, import from here; docs/contributing/add-a-method.md shows an example.
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
