from __future__ import annotations

from pathlib import Path

import pytest

from spikellm.profiling.powercap import Meter


def zone(
    root: Path, name: str, energy: int, limit: int = 1_000_000, label: str = "package-0"
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for file, content in (
        ("name", label),
        ("energy_uj", str(energy)),
        ("max_energy_range_uj", str(limit)),
    ):
        (folder / file).write_text(f"{content}\n")
    return folder


def test_counters_are_added_and_parts_of_a_package_are_not(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", 100), zone(tmp_path, "intel-rapl:1", 10)
    inner = zone(tmp_path, "intel-rapl:0:0", 50, label="core")
    meter = Meter(tmp_path)
    assert meter.missing is None
    before = meter.read()
    for folder, value in ((first, 2_000_100), (second, 500_010), (inner, 9_000_000)):
        (folder / "energy_uj").write_text(str(value))
    assert meter.joules(before, meter.read()) == pytest.approx(2.5)


def test_a_counter_that_starts_again(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", 900_000)
    meter = Meter(tmp_path)
    before = meter.read()
    (folder / "energy_uj").write_text("100000")
    assert meter.joules(before, meter.read()) == pytest.approx(0.2)


def test_no_counter_is_said(tmp_path: Path) -> None:
    assert "no counter" in str(Meter(tmp_path / "absent").missing)
    (tmp_path / "intel-rapl:0").mkdir()
    assert "no counter" in str(Meter(tmp_path).missing)


def test_a_counter_for_root_alone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", 1)
    read = Path.read_text

    def refuse(path: Path, *arguments: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", refuse)
    meter = Meter(tmp_path)
    assert "intel-rapl:0 may be read by root alone" in str(meter.missing)
    assert meter.counters == []
