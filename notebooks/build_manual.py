"""Build the manual: the pages and notebooks of this folder, and reference pages made from the code, as a Jupyter Book.

python notebooks/build_manual.py [OUTPUT]

Command help comes from the commands' own parsers, flags from the engine's table, speed from what ``make bench`` wrote
to ``bench-results`` and from the GPU's runs that are kept in ``tests/benchmarks/results``. These pages are made anew by
each build and kept nowhere else. Notebooks are shown as saved.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.checkup.environment import ENVIRONMENT

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "bench-results"
KEPT_RESULTS = HERE.parent / "tests" / "benchmarks" / "results"
"""Runs that were measured before: ``gpu-*.json``, ``cpu-*.json``, and a README that says more."""
HELP_COLUMNS = "80"
STYLE = """\
article pre { white-space: pre-wrap !important; overflow-wrap: anywhere; word-break: normal; }
div.highlight-text pre { font-size: 12px; }
div.cell_output .text_html, div.cell_output .text_html > div { overflow-x: auto; }
div.cell_output .text_html table { font-size: 12px !important; }
div.cell_output .text_html :is(td, th) { padding-right: 8px !important; white-space: normal !important; }
@media (max-width: 600px) {
  article table.table { font-size: 12px; }
  article table.table :is(td, th) { padding: 4px 5px; }
  article table.table code { white-space: normal; overflow-wrap: anywhere; }
}
"""
"""Long lines wrap, 80 columns of help fit, and a table fits between the columns of links or on a phone, or scrolls."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; pipes and line ends in cells are made harmless."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def commands_page() -> str:
    """``--help`` of every command."""
    from vm_magic.commands.table import COMMANDS, cell_commands, command_parser

    os.environ["COLUMNS"] = HELP_COLUMNS
    parts = [
        "# Commands",
        "`%vllm_metal COMMAND` runs a command in a line. "
        + ", ".join(f"`%%vllm_metal {name}`" for name in cell_commands())
        + " take a whole cell, and `%%chat` is short for `%%vllm_metal chat`. `--help` prints what is here, Tab "
        "completes commands, flags and models.",
    ]
    parts += [f"## {name}\n\n```text\n{command_parser(name).format_help()}```" for name in COMMANDS]
    return "\n\n".join(parts) + "\n"


def options_page() -> str:
    """The engine's flags, environment variables, settings of a running model, and what is refused."""
    from engine.params.engine_args import ENGINE_FLAGS
    from engine.params.vllm_flags import ACCEPTED_NO_OPS, REFUSED_FLAGS
    from vm_magic.state.settings_text import MEMORY_NAMES, SETTABLE

    flags = [
        (f"`--{flag.name}`", f"`{flag.metavar or ' '.join(flag.choices) or 'on, off'}`", escaped(flag.help))
        for flag in ENGINE_FLAGS
    ]
    return "\n".join(
        [
            "# Flags and environment\n",
            "Names and values are those of `vllm serve`; underscores do as well as dashes. As keywords of "
            "`engine.LLM` they have underscores. The port's own flags are in the help of [serve](commands.md#serve).\n",
            "## Engine flags\n",
            table(("flag", "value", "means"), flags),
            "## Environment\n",
            table(("variable", "means"), [(f"`{name}`", text) for name, text in ENVIRONMENT.items()]),
            "A flag goes before a variable, and both before the default.\n",
            "## Settings of a running model\n",
            "`%vllm_metal set NAME=VALUE` changes these while requests run, for all that do not say otherwise:",
            ", ".join(f"`{name}`" for name in SETTABLE) + ".\n",
            "The memory plan of a loaded model changes likewise, and its requests go on: "
            + ", ".join(f"`{name}`" for name in MEMORY_NAMES)
            + ".\n",
            "## Flags of vLLM that are refused\n",
            "They are refused by name, never ignored.\n",
            table(("flag", "instead"), [(f"`--{name}`", escaped(text)) for name, text in REFUSED_FLAGS.items()]),
            "Some are accepted with values that ask for what is done here in any case:\n",
            table(
                ("flag", "taken as"),
                [(f"`--{name}`", _taken_as(name, value)) for name, value in ACCEPTED_NO_OPS.items()],
            ),
        ]
    )


def _taken_as(name: str, so: bool | tuple[str, ...]) -> str:
    if isinstance(so, bool):
        return f"`--{name}`" if so else f"`--no-{name}`"
    return ", ".join(f"`{value}`" for value in so)


def escaped(text: str) -> str:
    """Help text as Markdown: nothing in it is markup."""
    return "".join(f"\\{char}" if char in "<>*_`[]$" else char for char in text)


def benchmarks_page(results: Path = RESULTS, kept: Path = KEPT_RESULTS) -> str:
    """The latest runs of ``make bench`` and of the GPU's part: machine, versions, settings and tables.

    Where ``make bench`` did not run, the run that was kept, or what ``kept`` says of a CPU.
    """
    intro = (
        "# Speed, measured\n\n`make bench` runs this engine and mlx-lm on the same weights, element type and BLAS, "
        "taking turns in one process, so that whatever else the machine does hits both alike.\n\n"
    )
    runs = sorted(results.glob("*.json"))
    gpu_runs = sorted(kept.glob("gpu-*.json"))
    parts = ["## On this machine\n", *run_text(_read(runs[-1]))] if runs else list(_kept_text(kept))
    parts += gpu_text(gpu_runs[-1]) if gpu_runs else []
    return intro + "\n".join(parts)


def _kept_text(kept: Path) -> Iterator[str]:
    """What was measured on a CPU elsewhere: the latest run that was kept, else in words."""
    yield (
        "Where this copy of the manual was built nothing had been measured: `make bench`, then `make manual` show that "
        "machine here. Until then, another one's:\n"
    )
    runs = sorted(kept.glob("cpu-*.json"))
    if runs:
        yield "## On a CPU\n"
        yield from run_text(_read(runs[-1]))
        return
    said = (kept / "README.md").read_text(encoding="utf-8") if (kept / "README.md").is_file() else ""
    _, title, text = said.partition("## On a CPU\n")
    yield title + text


def _read(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.read_text(encoding="utf-8"))
    return found


def gpu_text(run: Path) -> Iterator[str]:
    """A run of ``python -m tests.benchmarks --gpu`` as Markdown, with the picture that lies beside it."""
    found = _read(run)
    yield "## On a GPU\n"
    yield "A model of random weights in a known shape, which mlx-lm loads from the same folder.\n"
    picture = run.with_suffix(".svg")
    if picture.is_file():
        yield picture.read_text(encoding="utf-8")
    samples = (
        f"in {found['settings']['repeats']} turns; reading {found['settings']['bytes_per_second'] / 1e12:.2f} TB/s"
    )
    yield machine_table(found["machine"], samples)
    rows = []
    for case in found["cases"]:
        values = [f"{name}: {case['median'][name]:.4g}" for name in case["samples"]]
        floor, ratio, target = (
            "" if case[name] is None else f"{case[name]:.2f}" for name in ("floor", "ratio", "target")
        )
        rows.append([case["name"], "; ".join(values), case["unit"], floor, ratio, target])
    yield table(("case", "medians", "unit", "floor", "times better", "wanted"), rows)
    yield (
        "*Floor* is what reading the weights, keys and values once would take (for a prompt: its products at the "
        "rate of a large one). *Times better* compares the first two.\n"
    )


def machine_table(machine: dict[str, Any], samples: str) -> str:
    """What a run's numbers depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return table(
        ("measured", ""),
        [
            ("on", f"{machine['date']}, commit `{machine['commit'][:12]}`"),
            ("machine", f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB"),
            ("GPU", machine["gpu"] or "none"),
            ("system", f"{machine['system']}, Python {machine['python']}"),
            ("versions", versions),
            ("samples", samples),
        ],
    )


def run_text(run: dict[str, Any]) -> Iterator[str]:
    """One run as Markdown."""
    yield machine_table(
        run["machine"], f"{run['settings']['repeats']} of each, after {run['settings']['warmup']} unmeasured"
    )
    rows = []
    for case in run["cases"]:
        for place, (name, samples) in enumerate(case["samples"].items()):
            first = place == 0
            ratio = f"{case['ratio']:.2f}" if first and case["ratio"] is not None else ""
            numbers = [f"{value:.4g}" for value in (case["median"][name], min(samples), max(samples))]
            rows.append([case["name"] if first else "", name, *numbers, case["unit"], ratio])
    yield table(("case", "variant", "median", "least", "most", "unit", "times better"), rows)
    yield "*Times better* compares the medians of a case's first two variants; above 1 the first is better.\n"


GENERATED = {"commands": commands_page, "options": options_page, "benchmarks": benchmarks_page}
"""Pages made by each build, by their name in ``_toc.yml``."""


def for_the_book(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with what Sphinx needs: the lexer that knows magics, and outputs of kinds that a page can show."""
    notebook["metadata"]["language_info"]["pygments_lexer"] = "ipython3"
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/json", None)
    return notebook


def write_source(folder: Path) -> None:
    """All that the book is built from, in a new ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in [*HERE.glob("_*.yml"), *HERE.glob("*.md")]:
        shutil.copy(path, folder)
    for path in HERE.glob("*.ipynb"):
        notebook = for_the_book(json.loads(path.read_text(encoding="utf-8")))
        (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    if (HERE / "images").is_dir():
        shutil.copytree(HERE / "images", folder / "images")
    (folder / "_static").mkdir()
    (folder / "_static" / "outputs.css").write_text(STYLE, encoding="utf-8")
    for name, make in GENERATED.items():
        (folder / f"{name}.md").write_text(make(), encoding="utf-8")


def main() -> int:
    """The command line. Any warning fails the build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=HERE.parent / "build" / "manual")
    output = parser.parse_args().output.resolve()
    source = output / "source"
    write_source(source)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "-W", "-n", "--keep-going", "--all", "-q"]
    done = subprocess.run([*command, "--path-output", str(output), str(source)], check=False).returncode
    if done == 0:
        print(f"The manual: {output / '_build' / 'html' / 'index.html'}")
    return done


if __name__ == "__main__":
    sys.exit(main())
