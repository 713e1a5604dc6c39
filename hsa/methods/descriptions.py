"""Descriptions of methods from their declarations alone: the output of `hsa methods`, as JSON values.

Everything that a method's file declares is found automatically: no other module lists methods or their settings.
"""

from __future__ import annotations

from typing import Any

from hsa.methods.base import Contract, Method
from hsa.methods.registry import AnyMethod
from hsa.methods.settings import MAX_FLOAT32, Declared, Settings, declared


def describe(method: AnyMethod) -> dict[str, Any]:
    """A description of a method: what it computes, the sources and settings that it accepts, and the commands that
    accept it.

    Example:
        >>> from hsa.methods.registry import method_named
        >>> describe(method_named("linear"))["contract"]["least"]
        1
    """
    common = {each.name for each in declared(Settings)}
    return {
        "name": method.name,
        "version": method.version,
        "title": method.title,
        "formula": method.formula,
        "formula_of_defaults": type(method).formula_with is not Method.formula_with,
        "source": method.source,
        "contract": _contract(method.contract),
        "needs_heads": method.needs_heads,
        "settings": [_setting(each, common=each.name in common) for each in declared(method.Settings)],
        "commands": _commands(method),
    }


def models_text(contract: Contract) -> str:
    """How many models a method merges.

    Example:
        >>> models_text(Contract(least=2, most=8)), models_text(Contract(least=1, most=1))
        ('2 to 8', '1')
    """
    return f"{contract.least}" if contract.least == contract.most else f"{contract.least} to {contract.most}"


def _contract(contract: Contract) -> dict[str, Any]:
    return {
        "base": contract.base,
        "models": models_text(contract),
        "least": contract.least,
        "most": contract.most,
        "named": [{"role": role.name, "help": role.help} for role in contract.named],
    }


def _setting(each: Declared, *, common: bool) -> dict[str, Any]:
    about = each.about
    default = list(each.default) if isinstance(each.default, tuple) else each.default
    return {
        "name": each.key,
        "argument": each.name,
        "help": about.help,
        "required": about.required,
        "default": default,
        "default_text": default_text(each),
        "range": range_text(each),
        "low": about.low,
        "high": about.high,
        "choices": list(about.choices),
        "search": None if about.search is None else list(about.search),
        "per_tensor": about.per_tensor or about.varies,
        "per_layer": about.varies,
        "per_model": about.per_model,
        "sweep": about.axis,
        "of_every_method": common,
    }


def default_text(each: Declared) -> str:
    """The default of a setting in words; empty where it has none.

    Example:
        >>> from hsa.methods.linear import LinearSettings
        >>> [default_text(each) for each in declared(LinearSettings)][:2]
        ['1 each', 'on']
    """
    if each.about.required:
        return ""
    if each.about.default_text is not None:
        return each.about.default_text
    if isinstance(each.default, bool):
        return "on" if each.default else "off"
    if each.default is None:
        return ""
    return f"{each.default:g}" if isinstance(each.default, float) else str(each.default)


def range_text(each: Declared) -> str:
    """The values that a setting may have, in words; empty if its help lists them.

    Example:
        >>> from hsa.methods.hsa import HsaSettings
        >>> {each.key: range_text(each) for each in declared(HsaSettings)}["alpha"]
        'at least 0'
    """
    about = each.about
    if about.choices:
        return "" if all(choice in about.help for choice in about.choices) else ", ".join(about.choices)
    if isinstance(each.default, bool):
        return "on or off"
    kind = "whole numbers" if about.whole else "numbers"
    low, high = about.low, about.high
    bounded_below = low is not None and low > -MAX_FLOAT32
    bounded_above = high is not None and high < MAX_FLOAT32
    if bounded_below and bounded_above:
        return f"{low:g} to {high:g}"
    if bounded_below:
        return f"at least {low:g}"
    if bounded_above:
        return f"at most {high:g}"
    return f"all {kind}" if low is not None or high is not None or about.whole else ""


def _commands(method: AnyMethod) -> dict[str, Any]:
    """The commands that accept the method. If a patch cannot hold its merges, the reason is included."""
    obstacle = next(method.patch_obstacles(method.Settings()), None)
    return {
        "merge": True,
        "patch": obstacle is None,
        "why_no_patch": obstacle,
        "sweep": ["checkpoints"] if obstacle else ["patches", "checkpoints"],
        "verify": True,
        "release": True,
        "merger": method.elementwise,
        "shows_heads": method.selects_heads,
    }
