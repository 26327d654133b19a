"""Keys at the top of a recipe that stand for one key of every section that codes spikes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

SHORT_FORMS = ("train", "recoding")
_NOT_CODED = 16  # bits
_HEADS = ("query", "key", "value", "probabilities")


def spread(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Plain recipe data with short forms written out; what a section says itself stays.

    Inputs and parts of attention that are not coded have no spikes, and get nothing.
    """
    said = {key: data[key] for key in SHORT_FORMS if data.get(key) is not None}
    if not all(isinstance(value, str) for value in said.values()) or not said:
        return data  # refused by the field itself, or nothing to do
    found = {key: value for key, value in data.items() if key not in said}
    found["activations"] = _with(found.get("activations", {}), said)
    attention = _plain(found.get("attention"))
    if isinstance(attention, Mapping):
        found["attention"] = {
            key: _with(part, said) if key in _HEADS else part for key, part in attention.items()
        }
    return found


def forget_spread(data: dict[str, Any], key: str) -> None:
    """Take what sections say themselves out of plain data, where a short form is set anew."""
    attention = _plain(data.get("attention"))
    if isinstance(attention, Mapping):
        data["attention"] = {
            name: _without(part, key) if name in _HEADS else part
            for name, part in attention.items()
        }
    if "activations" in data:
        data["activations"] = _without(data["activations"], key)


def _with(section: Any, said: Mapping[str, Any]) -> Any:
    section = _plain(section)
    if not isinstance(section, Mapping) or section.get("bits") == _NOT_CODED:
        return section
    return {**said, **section}


def _without(section: Any, key: str) -> Any:
    section = _plain(section)
    if not isinstance(section, Mapping):
        return section
    return {name: value for name, value in section.items() if name != key}


def _plain(section: Any) -> Any:
    return section.model_dump() if isinstance(section, BaseModel) else section
