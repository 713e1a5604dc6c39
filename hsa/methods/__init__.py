"""What a merge computes: its parameters, the selection of heads, and the sums behind it.

A file with a method of your own imports from here; docs/add-a-method.md shows one.
"""

from hsa.findings import Findings
from hsa.methods.base import KEEP, Block, Contract, Method, ModelRole, NotFiniteSums, Treatment
from hsa.methods.settings import Settings, setting
from hsa.methods.tensors import CardText, Outcome, Summary, TensorRecord, TensorTask

__all__ = [
    "KEEP",
    "Block",
    "CardText",
    "Contract",
    "Findings",
    "Method",
    "ModelRole",
    "NotFiniteSums",
    "Outcome",
    "Settings",
    "Summary",
    "TensorRecord",
    "TensorTask",
    "Treatment",
    "setting",
]
