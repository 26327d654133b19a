"""The folder of a sweep: what it is a sweep of, its finished points, its table and its plot."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spikellm.commands.support.measure import Measured, row_of
from spikellm.core.errors import RequestError
from spikellm.core.files import cannot_write, require_name, write_atomically
from spikellm.core.io import PlainDataError, difference_in_words, read_json
from spikellm.models.stored_bits import StoredBits
from spikellm.models.summary import AttentionSummary, LayerSummary, ModelSummary
from spikellm.profiling.energy import Energy

RESULT, PLOT = "result.json", "pareto.svg"
_IDENTITY, _POINTS = "sweep.json", "points"


def require_sweep_folder(out: Path) -> None:
    """Refuse a folder that is no sweep's and not empty, or in which something stands where a sweep
    writes.

    Raises:
        RequestError: says what is there.
    """
    require_name(out.absolute())
    for part in (out, *out.parents):
        if part.exists() and not part.is_dir():
            raise RequestError(
                f"{part} is a file, expected a folder to keep the sweep in; choose another --out"
            )
    if not out.is_dir():
        return
    if (out / _POINTS).exists() and not (out / _POINTS).is_dir():
        raise RequestError(
            f"{out / _POINTS} is a file, expected the folder of finished points; move it or choose"
            " another --out"
        )
    for name in (_IDENTITY, RESULT, PLOT):
        if (out / name).is_dir():
            raise RequestError(
                f"{out / name} is a folder, expected a file that this sweep writes; move it or"
                " choose another --out"
            )
    others = [
        path
        for path in out.iterdir()
        if not (path.name.startswith(f".{_IDENTITY}.") and path.suffix == ".tmp")
    ]
    if others and not (out / _IDENTITY).exists():
        raise RequestError(f"{out} is not empty and holds no sweep; choose another --out")


class SweepFolder:
    """Finished points in a folder; without a folder it keeps nothing.

    Raises:
        RequestError: the folder holds points of something else, or is in use for other things.
        SpikeLLMError: the file system refused.
    """

    def __init__(self, out: Path | None, identity: dict[str, Any]) -> None:
        self._points = None if out is None else out / _POINTS
        self._texts: set[str] = set(identity["texts"])
        if out is None or self._points is None:
            return
        require_sweep_folder(out)
        identity, path = json.loads(json.dumps(identity)), out / _IDENTITY
        try:
            out.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._compare(out, identity)
            else:  # before the points, so that whatever is interrupted is known for a sweep
                write_atomically(
                    path,
                    lambda temporary: temporary.write_text(
                        json.dumps(identity, indent=2), encoding="utf-8"
                    ),
                )
            self._points.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(out, error) from None

    @staticmethod
    def _compare(out: Path, identity: dict[str, Any]) -> None:
        path = out / _IDENTITY
        try:
            known = read_json(path)
        except PlainDataError as error:
            raise RequestError(f"{path} is damaged ({error}); delete {out} to start anew") from None
        if not isinstance(known, dict):
            raise RequestError(
                f"{path} is damaged (it holds {type(known).__name__}, expected keys and values);"
                f" delete {out} to start anew"
            )
        differing = next((key for key in identity if known.get(key) != identity[key]), None)
        if differing:
            raise RequestError(
                f"{out} holds a sweep with another"
                f" {difference_in_words(differing, known.get(differing), identity[differing])};"
                " choose another --out"
            )

    def _path(self, identity: dict[str, Any]) -> Path | None:
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        return self._points / f"{name}.json" if self._points else None

    def measured(self, identity: dict[str, Any]) -> Measured | None:
        """A finished point; None if it is not there.

        Raises:
            RequestError: it is damaged.
        """
        path = self._path(identity)
        if path is None or not path.exists():
            return None
        try:
            data = read_json(path)["measured"]
            if "stored" not in data["summary"] and "layers" in data["summary"]:
                return None  # of an earlier version, which did not count stored bits
            found = _from_data(data)
            row_of("", [found], found.perplexity)  # what its figures are for
            whole = found.perplexity.keys() == self._texts
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            whole = False
        if not whole:
            raise RequestError(f"{path} is damaged; delete it to measure that point again")
        return found

    def keep(self, identity: dict[str, Any], found: Measured) -> Measured:
        """Write a point, as it is read again."""
        if path := self._path(identity):
            data = {
                **identity,
                "measured": {
                    **found._asdict(),
                    "summary": asdict(found.summary),
                    "energy": found.energy.to_data(),
                },
            }
            write_atomically(
                path,
                lambda temporary: temporary.write_text(
                    json.dumps(data, indent=1), encoding="utf-8"
                ),
            )
        return found


def _from_data(data: dict[str, Any]) -> Measured:
    summary = data["summary"]
    layers, attentions = (
        [LayerSummary(**one) for one in summary["layers"]],
        [AttentionSummary(**one) for one in summary["attentions"]],
    )
    stored = StoredBits(**summary["stored"])
    whole = ModelSummary(summary["kind"], layers, attentions, summary["total_bytes"], stored)
    return Measured(
        data["perplexity"],
        data["seconds"],
        whole,
        data["ace"],
        Energy.from_data(data["energy"]),
        data["spikes"],
        data["sops"],
    )
