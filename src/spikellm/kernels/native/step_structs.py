"""The structures of ``native/step.h``, which says the same in C."""

from __future__ import annotations

import ctypes
from typing import ClassVar

KINDS = (
    "norm",
    "linear",
    "additive",
    "dense",
    "weight_only",
    "rotate",
    "rope",
    "scale",
    "attend",
    "activate",
    "add",
)
NORMS = ("rms", "rms_wide", "layer_norm")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_steps", "relu")
TENSORS = 6  # of an operation

_int, _long, _float, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class View(ctypes.Structure):
    """Columns of a place."""

    _fields_: ClassVar = [
        ("at", _long),
        *((name, _int) for name in ("stride", "first", "heads", "apart", "size", "unused")),
    ]


class Op(ctypes.Structure):
    """An operation."""

    _fields_: ClassVar = [
        *((name, _int) for name in ("kind", "input", "other", "out", "a", "b", "c", "d")),
        ("x", _float),
        ("y", _float),
        ("data", _pointer * TENSORS),
    ]


class Cached(ctypes.Structure):
    """Keys and values of a layer; addresses are plain numbers, ``memory`` what they point to."""

    memory: object

    _fields_: ClassVar = [
        (name, _long)
        for name in (
            "keys",
            "values",
            "key_head",
            "value_head",
            "room",
            "first",
            "past",
            "total",
            "keep",
        )
    ]


class Attention(ctypes.Structure):
    """Attention of a layer."""

    _fields_: ClassVar = [
        *(
            (name, _int)
            for name in (
                "heads",
                "kv_heads",
                "key_size",
                "value_size",
                "layer",
                "window",
                "value",
                "centered",
                "balanced",
                "rotated",
                "type",
                "unused",
            )
        ),
        ("scaling", _float),
        ("softcap", _float),
        *(
            (name, _pointer)
            for name in (
                "query_plan",
                "key_plan",
                "value_plan",
                "mean",
                "key_map",
                "query_map",
                "signs",
                "center",
            )
        ),
    ]


class Program(ctypes.Structure):
    """A list of operations."""

    _fields_: ClassVar = [
        ("views", _pointer),
        ("ops", _pointer),
        ("count", _long),
        ("floats", _long),
        ("type", _int),
        ("lanes", _int),
    ]


class Call(ctypes.Structure):
    """One pass."""

    _fields_: ClassVar = [
        *((name, _long) for name in ("batch", "queries", "first", "last", "apart")),
        *(
            (name, _pointer)
            for name in ("input", "output", "cached", "cos", "sin", "positions", "mask")
        ),
        ("mask_tokens", _long),
        ("seen", _pointer),
        ("forced", _pointer),
        *((name, _int) for name in ("threads", "commit", "result", "unused")),
    ]
