"""The manual's sources: generated pages hold everything, the table of contents names every page, quotes are real."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.params.engine_args import ENGINE_FLAGS
from engine.params.vllm_flags import ACCEPTED_NO_OPS, REFUSED_FLAGS
from vm_magic.commands.table import COMMANDS, command_parser

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("build_manual", NOTEBOOKS / "build_manual.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


manual = load_generator()


@pytest.fixture(autouse=True)
def _keep_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def pages_of_the_contents() -> list[str]:
    contents = yaml.safe_load((NOTEBOOKS / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    return [contents["root"], *chapters]


def source_of_the_package() -> str:
    paths = (path for top in ("engine", "vm_magic") for path in (ROOT / top).rglob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def test_the_contents_name_every_page_and_notebook_once() -> None:
    written = {path.stem for pattern in ("*.md", "*.ipynb") for path in NOTEBOOKS.glob(pattern)}
    pages = pages_of_the_contents()
    assert sorted(pages) == sorted(written | set(manual.GENERATED))


def test_the_commands_page_has_every_commands_help_as_its_parser_gives_it() -> None:
    page = manual.commands_page()
    for name in COMMANDS:
        help_text = re.search(rf"## {name}\n\n```text\n(.*?)```", page, re.DOTALL)
        assert help_text is not None, name
        assert set(re.findall(r"--[a-z][\w-]*", help_text[1])) >= set(command_parser(name).flags())


def test_the_options_page_has_every_flag_and_every_refused_one() -> None:
    page = manual.options_page()
    for name in [*(flag.name for flag in ENGINE_FLAGS), *REFUSED_FLAGS]:
        assert f"| `--{name}` |" in page
    assert "| `--tensor-parallel-size` | `1` |" in page
    assert "| `--enforce-eager` | `--no-enforce-eager` |" in page
    assert page.count("|\n") >= len(ENGINE_FLAGS) + len(REFUSED_FLAGS) + len(ACCEPTED_NO_OPS)


def test_every_environment_variable_that_the_code_reads_is_in_the_table() -> None:
    pattern = r"\"((?:VLLM|HF|TRANSFORMERS|XDG|OPENBLAS|LLM|JUPYTERHUB|JPY|CUDA_VISIBLE)_[A-Z_]*[A-Z])\""
    table = (ROOT / "engine" / "checkup" / "environment.py").read_text(encoding="utf-8")
    read = source_of_the_package().replace(table.partition("AREA = ")[2].partition("\n}\n")[0], "")
    assert set(re.findall(pattern, read)) == set(manual.ENVIRONMENT)


def test_what_troubleshooting_quotes_is_what_the_code_says() -> None:
    page = (NOTEBOOKS / "troubleshooting.md").read_text(encoding="utf-8")
    quotes = [quote for term in re.findall(r"\n\n(.*)\n: ", page) for quote in re.findall(r"`([^`]{12,})`", term)]
    assert len(quotes) > 10
    source = re.sub(r"\"\s*f?\"", "", re.sub(r"\{[^{}]*\}", "N", source_of_the_package()))
    assert [quote for quote in quotes if quote not in source] == []


def test_every_picture_is_there_small_and_shown() -> None:
    pages = [ROOT / "README.md", *NOTEBOOKS.glob("*.md")]
    shown = {
        name
        for page in pages
        for name in re.findall(r"\]\((?:notebooks/)?images/([\w-]+\.(?:png|gif))\)", page.read_text())
    }
    pictures = {path.name: path.stat().st_size for path in (NOTEBOOKS / "images").iterdir()}
    assert shown == set(pictures)
    assert max(size for name, size in pictures.items() if name.endswith(".png")) < 150_000
    assert max(pictures.values()) < 600_000, "moving ones too"


@pytest.mark.parametrize("page", ["index", "troubleshooting", "how_it_works", "attention"])
def test_links_lead_to_pages_of_the_book(page: str) -> None:
    text = (NOTEBOOKS / f"{page}.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([\w/]+)\.(?:md|ipynb)[^)]*\)", text)
    assert links
    assert set(links) <= set(pages_of_the_contents())


def test_the_benchmark_page_is_a_table_of_the_latest_run(tmp_path: Path) -> None:
    assert "make bench" in manual.benchmarks_page(tmp_path)
    case = {"name": "decode", "unit": "tokens/s", "settings": {}, "target": None}
    machine = {
        "date": "2026-01-02T03:04:05", "commit": "0123456789abcdef", "processor": "A|B", "cores": 2, "gpu": "",
        "memory_bytes": 16e9, "system": "Linux", "python": "3.11", "packages": {"mlx": "1"},
    }  # fmt: skip
    for day, speed in ((1, 10.0), (2, 20.0)):
        samples = {"ours": [speed, speed + 2, speed + 1], "theirs": [5.0]}
        median = {"ours": speed + 1, "theirs": 5.0}
        run = {
            "machine": machine, "settings": {"repeats": 3, "warmup": 1},
            "cases": [{**case, "samples": samples, "median": median, "ratio": 4.2}],
        }  # fmt: skip
        (tmp_path / f"2026-01-0{day}.json").write_text(json.dumps(run))
    page = manual.benchmarks_page(tmp_path)
    assert "| decode | ours | 21 | 20 | 22 | tokens/s | 4.20 |" in page
    assert "|  | theirs | 5 | 5 | 5 | tokens/s |  |" in page
    assert "A\\|B, 2 cores, 16 GB" in page


def test_without_a_run_here_the_kept_one_is_shown_with_its_machine(tmp_path: Path) -> None:
    nothing_here = manual.benchmarks_page(tmp_path)
    assert "make bench" in nothing_here
    assert "## On a CPU" in nothing_here
    assert "EPYC" in nothing_here
    assert "## On a GPU" in nothing_here
    machine = {
        "date": "2026-01-02T03:04:05", "commit": "0123456789abcdef", "processor": "Another one", "cores": 2, "gpu": "",
        "memory_bytes": 16e9, "system": "Linux", "python": "3.11", "packages": {"mlx": "1"},
    }  # fmt: skip
    run = {"machine": machine, "settings": {"repeats": 3, "warmup": 1}, "cases": []}
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "cpu-2026-01-02.json").write_text(json.dumps(run))
    page = manual.benchmarks_page(tmp_path, kept)
    assert "Another one, 2 cores, 16 GB" in page
    assert "commit `0123456789ab`" in page
    (tmp_path / "2026-01-03.json").write_text(json.dumps({**run, "machine": {**machine, "processor": "This one"}}))
    page = manual.benchmarks_page(tmp_path, kept)
    assert "## On this machine" in page
    assert "This one" in page
    assert "Another one" not in page


def test_long_lines_of_the_book_wrap() -> None:
    assert "article pre { white-space: pre-wrap !important" in manual.STYLE


def test_a_run_of_the_benchmarks_is_understood(tmp_path: Path) -> None:
    from tests.benchmarks.harness import Case, Result, as_json, save
    from tests.benchmarks.machine import describe

    result = Result(Case("one alone", "s", "lower", {}), {"only": [1.0, 3.0, 2.0]})
    machine = describe()
    save(as_json([result], machine, {"repeats": 3, "warmup": 1}), tmp_path, machine["date"])
    assert "| one alone | only | 2 | 1 | 3 | s |  |" in manual.benchmarks_page(tmp_path)


def test_a_gpu_run_is_shown_with_its_floors_wanted_ratios_and_picture(tmp_path: Path) -> None:
    from tests.benchmarks.gpu.plot import plot_file
    from tests.benchmarks.harness import Case, Result, as_json, save
    from tests.benchmarks.machine import describe

    nothing = manual.benchmarks_page(tmp_path, tmp_path)
    assert "On a GPU" not in nothing
    facts = {"kind": "decode", "bits": 16, "rows": 8}
    case = Case("decode, batch 8", "ms", "lower", {}, facts, target=2.0, floor=1.86)
    result = Result(case, {"LLM": [3.4], "mlx-lm BatchGenerator": [10.2]})
    settings = {"repeats": 2, "bytes_per_second": 4.6e12, "sizes": {"shape": "tiny", "context": 512}}
    path = save(as_json([result], describe(), settings), tmp_path / "gpu", "gpu-2030-01-02")
    plot_file(path, path.with_suffix(".svg"))
    page = manual.benchmarks_page(tmp_path, tmp_path / "gpu")
    assert page.startswith(nothing.rstrip())
    assert "| decode, batch 8 | LLM: 3.4; mlx-lm BatchGenerator: 10.2 | ms | 1.86 | 3.00 | 2.00 |" in page
    assert "<svg" in page
    assert "4.60 TB/s" in page


def test_the_source_holds_all_pages_and_no_output_that_a_page_cannot_show(tmp_path: Path) -> None:
    manual.write_source(tmp_path / "source")
    for page in pages_of_the_contents():
        assert list((tmp_path / "source").glob(f"{page}.*")), page
    texts = [path.read_text(encoding="utf-8") for path in (tmp_path / "source").glob("*.ipynb")]
    assert not any('"application/json"' in text for text in texts)


@pytest.mark.skipif(shutil.which("jupyter-book", path=str(Path(sys.executable).parent)) is None,
                    reason="make manual installs jupyter-book")  # fmt: skip
def test_the_book_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, str(NOTEBOOKS / "build_manual.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
