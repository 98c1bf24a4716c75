"""benchmarks/accelerator.py, as it runs on a CPU: every figure is there, and those that say whether it is right are right."""

import json
import sys

import pytest
import tiny


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(tiny.ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    import accelerator

    return accelerator


def test_every_part_has_its_figures(accelerator, tmp_path, capsys):
    parts = "parity,limits,decode,train"
    options = ["--model", "tiny", "--runs", "1", "--parts", parts, "--out", str(tmp_path)]
    assert accelerator.main(options) == 0
    report = json.loads((tmp_path / "cpu.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert {row["part"] for row in report["rows"]} == set(parts.split(","))
    assert rows["sampled tokens equal to the CPU's"]["value"] == 1
    assert rows["loss: largest difference / scale"]["value"] < 1e-5
    assert all(row["value"] > 0 for row in report["rows"] if row["unit"] not in ("", "share"))
    assert f"| limits | copy | {rows['copy']['value']:.4g} |" in (tmp_path / "cpu.md").read_text()
    assert accelerator.main(["--parts", "kernels,pages", "--model", "tiny", "--runs", "1", "--out", str(tmp_path)]) == 0
    kernels = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert len(kernels) == 30 + 3 and all(row["value"] < 0.02 for row in kernels if row["unit"] == "")


def test_a_part_that_fails_is_a_row(accelerator, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(accelerator.RUN, "limits", lambda bench: iter([1 / 0]))
    options = ["--model", "tiny", "--parts", "limits", "--out", str(tmp_path)]
    assert accelerator.main(options) == 1
    (row,) = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert row["name"] == "FAILED: ZeroDivisionError: division by zero"
