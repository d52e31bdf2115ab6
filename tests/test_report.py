"""`deltacome report`: results of benchmarks as one page."""

import html
import importlib.util
import re
import shutil
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from commands import fail, succeed
from deltacome import DeltacomeError
from deltacome.benchmark import page
from deltacome.benchmark.results import Table, save
from deltacome.evaluate.summary import import_pyplot

CHROMIUM = shutil.which("chromium")
EVIL = "<script>alert(1)</script> & \"quoted\" 'too' $\\frac$"
LONG = "x" * 300
KL = {"name": "method", "bytes": "bytes", "on_task_kl": "on-task KL"}
QUALITY = [{"name": f"{EVIL} {i % 2}", "bytes": 10**6 * i, "on_task_kl": 0.1 / i, "long": LONG} for i in range(1, 20)]
MEMORY = [{"tenants": n, "gigabytes": 13 + n, "merged_gigabytes": 13.0 * n} for n in (2, 5)]
RUNTIME = [{"tenants": n, "tenants_ms": 9 + n, "turns_ms": 8 * n, "base_ms": 8} for n in (1, 64)]


def put(folder: Path, benchmark: str, rows: list[dict[str, Any]], columns: dict[str, str], **more: Any) -> Path:
    folder.mkdir(parents=True)
    save(folder, benchmark, [Table(f"table of {EVIL}", columns, rows)], **more)
    return folder / f"{benchmark}.json"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    figure, axes = import_pyplot().subplots(figsize=(16, 4))
    axes.plot([1, 2])
    columns = KL | {f"long_{i}": f"a heading of column {i}" for i in range(9)} | {"long": "long"}
    put(folder / "a-quality", "quality", QUALITY, columns, figure=figure, title=EVIL)
    put(folder / "h100-memory", "memory", MEMORY, dict.fromkeys(MEMORY[0], "heading"))
    put(folder / "deeper/runtime", "runtime", RUNTIME, dict.fromkeys(RUNTIME[0], "heading"))
    put(folder / ".half.tmp", "memory", MEMORY, {"tenants": "hidden"})
    (folder / "deeper/other.json").write_text('{"some": "thing"}')
    (folder / "deeper/broken.json").write_text("{")
    return folder


def test_page_has_everything_and_loads_nothing(results: Path, tmp_path: Path) -> None:
    (out := tmp_path / "report.html").write_text("old")
    assert succeed("report", results, results / "h100-memory/memory.json", "-o", out) == f"{out}: 3 results\n"
    text = out.read_text()
    titles = [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", text)]
    assert titles == ["At a glance", EVIL, "Runtime", "Memory, h100"]
    assert re.findall(r"<h3>(\w+) against", text) == ["Quality", "Memory", "Time"]
    assert "64 tenants: one base with deltas 73 ms, merged models in turn 512 ms, the base alone 8 ms." in text
    assert "<script" not in text and "&lt;script&gt;" in text and "hidden" not in text
    loads = re.findall(r'(?:src|srcset|data|href|action)="([^"]*)"|url\(|@import', text)
    assert all(load.startswith(("data:", "#")) for load in loads) and "default-src 'none'" in text
    images = re.findall(r'<img src="data:image/(png|svg\+xml);base64,([\w+/=]+)"[^>]*\salt="[^"]+"', text)
    assert [kind for kind, _ in images] == ["svg+xml"] * 3 + ["png"] and text.count("<img") == 4
    assert images[3][1] == b64encode((results / "a-quality/quality.png").read_bytes()).decode()
    assert text.count("<details>") == 1 and "All 19 rows" in text
    assert '<td class="number">0.1</td>' in text and f"<td>{LONG}</td>" in text
    assert page.write_report([results], out) == 3 and out.read_text() == text


def test_without_pictures(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (results / "a-quality/quality.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page.write_report([results], tmp_path / "report.html")
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert "warning: the report has no pictures at a glance: plots need matplotlib" in capsys.readouterr().err


def test_several_of_a_kind_and_figures_that_no_axis_has(tmp_path: Path) -> None:
    put(tmp_path / "a/memory", "memory", MEMORY, {"tenants": "tenants"})
    put(tmp_path / "b/memory", "memory", [*MEMORY, {"tenants": 0, "gigabytes": float("nan")}], {"tenants": "tenants"})
    put(tmp_path / "c/memory", "memory", [{"tenants": 3, "gigabytes": None}, {"gigabytes": "x"}], {})
    page.write_report([tmp_path], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("<h3>Memory against tenants</h3>") == 2


def test_errors(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    odd = put(tmp_path / "odd", "odd", [{"artifact_ratio": 16}], {"artifact_ratio": "ratio"})
    odd.write_text(odd.read_text().replace("16\n", '"x"\n'))
    fail("broken.json is no result of a benchmark: Expecting", "report", results / "deeper/broken.json", "-o", out)
    wrong = {
        tmp_path / "nowhere": "cannot read .*nowhere: No such file",
        tmp_path / "empty": "there is no result of a benchmark in .*empty",
        results / "deeper/other.json": "other.json is no result of a benchmark: it has not the benchmark, command",
        odd: "has a figure that is no number",
    }
    for named, message in wrong.items():
        with pytest.raises(DeltacomeError, match=message):
            page.write_report([results, named], out)
    with pytest.raises(DeltacomeError, match="cannot write"):
        page.write_report([results], tmp_path / "no/report.html")
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium in PATH")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright")
def test_page_fits_screens(results: Path, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    page.write_report([results], tmp_path / "report.html")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width in (390, 1280):
            screen = browser.new_page(viewport={"width": width, "height": 900})
            screen.goto((tmp_path / "report.html").as_uri())
            screen.locator("summary").click()
            assert screen.evaluate("document.documentElement.scrollWidth") == width
            assert screen.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            assert screen.locator("details .box").evaluate("box => box.scrollWidth > box.clientWidth")
        browser.close()
