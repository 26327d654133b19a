"""The words of recipes of version 1, section by section, as version 2 says them.

Version 1 had ``pipeline`` with a section of options for each algorithm, all fields of all weight
formats in one section, a section ``rotation``, and regular expressions in overrides. What it
refused, or what makes no sense, is left for the validation of version 2 to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spikellm.core.errors import RecipeError
from spikellm.core.registry import unknown_name
from spikellm.recipe.overrides import EXPRESSION, is_expression

ALGORITHMS = ("gptq", "omniquant")  # that had a section of their own
_RENAMED = {
    "gptq": {"damping": "percdamp", "compensation_damping": "compensation_percdamp"},
    "weights": {"code": "format", "budget_over": "allocation"},
    "activations": {"salient_over": "allocation"},
}
_SWITCHES = ("residual", "value_output", "equalize")
HEADS = ("query", "key", "value", "probabilities")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gptq": {
        "damping": 0.01,
        "activation_order": True,
        "search_range": False,
        "compensate": False,
        "compensation_damping": 0.03,
        "rounds": 6,
    },
    "omniquant": {
        "epochs": 20,
        "batch_size": 2,
        "accumulate": 1,
        "precision": "float32",
        "let": True,
        "lwc": True,
        "pairs": ["norm", "value-output", "query-key"],
        "alpha": 0.75,
        "let_rate": 0.02,
        "lwc_rate": 0.02,
        "saliency_after_smoothing": True,
    },
}
# Fields that a format of version 2 does not have, at the only values that version 1 allowed.
_SALIENT = {"salient_steps": 1, "saliency": "second-order", "invert": False}
_IDLE: dict[str, dict[str, Any]] = {
    "affine": {"budget": None, "allocation": "layer"},
    "ternary": {"bits": 2, "symmetric": True},
    "partly-binary": {**_SALIENT, "symmetric": False, "budget": None, "allocation": "layer"},
}


def has_old_words(section: str, value: Any) -> bool:
    """Whether the value of a section has keys that version 2 names otherwise."""
    return not _RENAMED.get(section, {}).keys().isdisjoint(mapping(value))


def has_old_overrides(value: Any) -> bool:
    """Whether overrides have words of version 1, or patterns that can only be expressions."""
    return isinstance(value, (list, tuple)) and any(
        has_old_words("weights", mapping(one).get("weights"))
        or has_old_words("activations", mapping(one).get("activations"))
        or _is_old_pattern(mapping(one).get("match"))
        for one in value
    )


def algorithm_of(section: str, value: Any, chosen: Any) -> dict[str, Any]:
    """Options that the section of an algorithm gives to the chosen one.

    Raises:
        RecipeError: it is the section of another algorithm, and changes something.
    """
    if not isinstance(value, Mapping):
        raise RecipeError(f"{section}: expected keys and values, found {value!r}")
    if section == chosen:
        found = dict(renamed(section, value))
        if section == "gptq" and found.get("compensate") is True:  # the default is another now
            found.setdefault("compensation_percdamp", _DEFAULTS["gptq"]["compensation_damping"])
        return found
    if any(_unlike(value[key], _DEFAULTS[section].get(key)) for key in value):
        raise RecipeError(
            f"the section {section} has no effect on algorithm {chosen!r}; set algorithm to"
            f" {section}"
        )
    return {}


def renamed(section: str, value: Any) -> Any:
    """A section with its fields named as in version 2.

    Raises:
        RecipeError: it has a field by both names.
    """
    if not isinstance(value, Mapping):
        return value
    words = {old: new for old, new in _RENAMED.get(section, {}).items() if old in value}
    for old, new in words.items():
        if new in value:
            raise RecipeError(f"{section}: {old} and {new} name the same field; give {new} alone")
    return {words.get(key, key): one for key, one in value.items()}


def weights_of(value: Any, chosen: str = "affine") -> Any:
    """The section ``weights``: without the fields that its format has no more, where they said
    nothing.

    Args:
        chosen: the format, where the section names none.
    """
    found = renamed("weights", value)
    if not isinstance(found, dict):
        return found
    idle = _IDLE.get(str(found.get("format", chosen)), {})
    return {key: one for key, one in found.items() if key not in idle or _unlike(one, idle[key])}


def format_of(weights: Any) -> str:
    """The format that plain data of the section ``weights`` names."""
    return str(mapping(weights).get("format", "affine"))


def attention_of(value: Any) -> Any:
    """The section ``attention``."""
    if not isinstance(value, Mapping):
        return value
    return {key: renamed("activations", one) if key in HEADS else one for key, one in value.items()}


def has_coded_keys(attention: Any) -> bool:
    """Whether plain data of the section ``attention`` codes K."""
    return bool(mapping(mapping(attention).get("key")).get("bits", 16) != 16)


def overrides_of(value: Any, chosen: str) -> Any:
    """Overrides, their expressions marked as such.

    Args:
        chosen: the format of the recipe's weights.
    """
    if not isinstance(value, (list, tuple)):
        return value
    found = [_override_of(one, chosen) for one in value]
    return [one for one in found if one is not None]


def _override_of(value: Any, chosen: str) -> Any:
    """One override; None if what it set says nothing any more."""
    if not isinstance(value, Mapping):
        return value
    override = dict(value)
    if isinstance(weights := renamed("weights", override.get("weights")), Mapping):
        if chosen == "ternary" and weights.get("format", chosen) == "affine":
            weights = {"bits": 2, "symmetric": True, **weights}  # as the ternary ones were
        override["weights"] = weights_of(weights, chosen)
    if "activations" in override:
        override["activations"] = renamed("activations", override["activations"])
    match = override.get("match")
    if isinstance(match, str) and not match.replace("_", "").isalnum():
        override["match"] = EXPRESSION + match
    emptied = bool(value.get("weights")) and override["weights"] == {}
    return (
        None if emptied and not (override.get("activations") or override.get("skip")) else override
    )


def transforms_of(rotation: Any, *, coded_keys: bool) -> list[dict[str, Any]]:
    """The section ``rotation`` as transforms, in the order in which version 1 applied them.

    Raises:
        RecipeError: an unknown key, or a switch that is neither true nor false.
    """
    if not isinstance(rotation, Mapping):
        raise RecipeError(f"rotation: expected keys and values, found {rotation!r}")
    for key, value in rotation.items():
        if key not in {*_SWITCHES, "online", "choose"}:
            valid = [f"rotation.{one}" for one in (*_SWITCHES, "online", "choose")]
            raise RecipeError(unknown_name("key", f"rotation.{key}", valid))
        if key in _SWITCHES and not isinstance(value, bool):
            raise RecipeError(f"rotation.{key}: expected true or false, found {value!r}")
    residual, value_output, equalize = (rotation.get(key, False) for key in _SWITCHES)
    online, choose = rotation.get("online", ()), rotation.get("choose", "all")
    layers = list(online) if isinstance(online, (list, tuple)) else online
    named = layers if isinstance(layers, list) else []
    found: list[dict[str, Any]] = []
    if residual:
        found.append({"name": "residual-rotation"})
    if equalize:
        sites = {
            "query-key": coded_keys,
            "value-output": value_output or "output" in named,
            "up-down": "down" in named,
        }
        found.append({"name": "equalization", "sites": [one for one in sites if sites[one]]})
    if value_output:
        found.append({"name": "value-output-rotation"})
    if layers or choose != "all":
        found.append({"name": "online-rotation", "layers": layers, "choose": choose})
    return found


def rotation_of(transforms: Any) -> tuple[dict[str, Any], list[Any]]:
    """Transforms as the section ``rotation``, and those that it has no words for."""
    rotation: dict[str, Any] = {}
    others: list[Any] = []
    for one in transforms if isinstance(transforms, (list, tuple)) else ():
        name = one if isinstance(one, str) else mapping(one).get("name")
        if name == "residual-rotation":
            rotation["residual"] = True
        elif name == "equalization":
            rotation["equalize"] = True
        elif name == "value-output-rotation":
            rotation["value_output"] = True
        elif name == "online-rotation":
            rotation["online"] = mapping(one).get("layers", ["output", "down"])
            rotation["choose"] = mapping(one).get("choose", "all")
        else:
            others.append(one)
    return rotation, others


def _is_old_pattern(match: Any) -> bool:
    return isinstance(match, str) and not match.startswith(EXPRESSION) and is_expression(match)


def _unlike(one: Any, other: Any) -> bool:
    """Whether two values of plain data differ; lists and tuples do not, 1 and true do."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(one) != list(other)
    return bool(one != other) or isinstance(one, bool) != isinstance(other, bool)


def mapping(value: Any) -> Mapping[str, Any]:
    """A section, or nothing where there is none."""
    return value if isinstance(value, Mapping) else {}
