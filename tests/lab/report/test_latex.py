"""The LaTeX tables: whole environments, as many columns in every line, and text that prints as it is."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from merganser.cli.report import report_command
from merganser.lab.report.latex import MOST_LINES, escape, render_latex
from merganser.lab.report.rows import ResultRow, read_rows
from merganser.lab.report.sections import Section, make_sections

NASTY = "[a_b]*%&#$~^\\{}<>|\"'`--''−±…“”‘’→ ,,é"
_TOKEN = re.compile(r"\\symbol\{34\}|\\[A-Za-z]+\s*|\\.|---?|``|''|\$[^$]*\$|<<|>>|,,|.", re.DOTALL)
#: What TeX prints for its commands and ligatures. A bare special character has no entry, and is an error.
_PRINTED = {
    r"\symbol{34}": '"',
    r"\textbackslash": "\\",
    r"\textasciitilde": "~",
    r"\textasciicircum": "^",
    r"\textasciigrave": "`",
    r"\textless": "<",
    r"\textgreater": ">",
    r"\textbar": "|",
    r"\ldots": "…",
    "$-$": "−",
    r"$\pm$": "±",
    r"$\times$": "×",
    r"$\rightarrow$": "→",
    "---": "—",
    "--": "–",
    "``": "“",
    "''": "”",
    "`": "‘",
    "'": "’",
    "{": "",
    "}": "",
    "~": " ",
    **{f"\\{character}": character for character in "_%&#${}"},
}


def printed(source: str) -> str:
    """What TeX makes of a line of text."""
    found = []
    for token in _TOKEN.findall(source):
        assert token in _PRINTED or (len(token) == 1 and token not in '\\_^&#%$<>|"'), token
        found.append(_PRINTED.get(token, token))
    return "".join(found)


@given(st.text(st.sampled_from(NASTY + "ab -")))
def test_text_prints_as_it_is(text: str) -> None:
    source = escape(text)
    assert printed(source) == " ".join(re.split(r"[ ]+", text)).replace("'", "’")
    assert not source.startswith(("[", "*")), "these would be arguments of the command before"
    depth = 0
    for token in _TOKEN.findall(source):
        depth += (token == "{") - (token == "}")
        assert depth >= 0
    assert depth == 0


def test_text_of_several_lines_is_one() -> None:
    assert escape("a\n\nb\t%c") == r"a b \%c"


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory, examples: ModuleType) -> list[Section]:
    names = (NASTY, "[x", "*y", *examples.EMOTION, "v", "w")  # 45 pairs: a long table
    rows = [*examples.pairs(names=names, seeds=(1, 2), heads=("same",)), *examples.greedy(seeds=(1, 2))]
    rows = [r for r in rows if not (r["title"] == "Fisher" and r["seed"] == 2 and r["layout"] == "greedy")]
    rows += [*examples.glue_pairs(seeds=(1,)), *examples.partitions(seeds=(1,))]
    for row in rows:
        row["title"] += " " + NASTY
        row["experiment"] += " " + NASTY + "\n\\end{table}"
        row["model"] = NASTY
    file = tmp_path_factory.mktemp("nasty") / "rows.json"
    file.write_text(json.dumps(rows))
    return make_sections(read_rows(file), "simple")


def uncommented(source: str) -> str:
    return "\n".join(re.sub(r"(?<!\\)%.*", "", line) for line in source.splitlines())


def tabulars(source: str) -> list[tuple[str, list[str]]]:
    """Column letters and lines of every table."""
    found = re.findall(r"\\begin\{(tabular|longtable)\}\{([lr]+)\}\n(.*?)\\end\{\1\}", uncommented(source), re.DOTALL)
    return [(letters, body.splitlines()) for _, letters, body in found]


def width(line: str) -> int:
    """How many columns a line of a table fills."""
    cells = re.split(r"(?<!\\)&", line)
    return sum(int(span[1]) if (span := re.match(r"\s*\\multicolumn\{(\d+)\}", c)) else 1 for c in cells)


def test_environments_and_braces_are_balanced(nasty: list[Section]) -> None:
    source = uncommented(render_latex(nasty))
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", source):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened
    bare = re.sub(r"\\[{}\\]", "", source)
    assert bare.count("{") == bare.count("}")
    assert source.count(r"\toprule") == source.count(r"\begin{tabular}") + 2 * source.count(r"\begin{longtable}")
    assert source.count(r"\bottomrule") == source.count(r"\begin{tabular}") + source.count(r"\begin{longtable}")
    labels = re.findall(r"\\label\{([^}]*)\}", source)
    assert len(labels) == len(set(labels)) and all(re.fullmatch(r"tab:[a-z0-9-]+", one) for one in labels)


def test_every_line_fills_every_column(nasty: list[Section]) -> None:
    source = render_latex(nasty)
    tables = [table for section in nasty for block in section.blocks for table in block.tables]
    assert len(tabulars(source)) == len(tables) == source.count(r"\caption{")
    for (letters, lines), table in zip(tabulars(source), tables, strict=True):
        assert len(letters) == 1 + len(table.columns)
        rows = [line for line in lines if line.endswith(r"\\") and not line.startswith(r"\caption")]
        assert {width(row) for row in rows} == {len(letters)}, table.key
        groups = len({line.group for line in table.lines} - {""})
        heads = (1 + bool(table.spans)) * (2 if len(table.lines) > MOST_LINES else 1)
        assert len(rows) == len(table.lines) + groups + heads
        rules = [
            tuple(map(int, rule)) for line in lines for rule in re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", line)
        ]
        expected, first = [], 2
        for _, count in table.spans:
            expected.append((first, first + count - 1))
            first += count
        assert rules[: len(expected)] == expected


def test_the_packages_that_are_needed_are_named(nasty: list[Section], examples: ModuleType) -> None:
    assert render_latex(nasty).startswith(
        "% Needs \\usepackage{booktabs} \\usepackage{graphicx} \\usepackage{longtable}\n"
    )
    rows = [ResultRow.model_validate(row) for row in examples.partitions(seeds=(1,))]
    source = render_latex(make_sections(rows, "simple"))
    assert source.startswith("% Needs \\usepackage{booktabs} \\usepackage{graphicx}\n")
    assert "longtable" not in source


def test_marks_stars_deviations_and_counts(examples: ModuleType) -> None:
    rows = examples.pairs(seeds=(1, 2, 3), heads=("same",))
    begun = [r for r in rows if r["title"] == "Fisher"][4:]
    rows = [ResultRow.model_validate(row) for row in rows if row not in begun]
    (section,) = make_sections(rows, "simple")
    summary = section.blocks[0].tables[0]
    cells = {line.title: line.cells[0] for line in summary.lines}
    assert cells["RegMean"].stars == "**" and cells["Fisher"].counted
    source = render_latex([section])
    best, second, few = cells["RegMean"], cells["Simple"], cells["Fisher"]
    assert (
        rf"RegMean & \textbf{{{best.value:.1f}}}\textsuperscript{{**}} {{\scriptsize $\pm$ {best.std:.1f}}} & "
        in source
    )
    assert rf"Simple & \underline{{{second.value:.1f}}} {{\scriptsize $\pm$ {second.std:.1f}}} & " in source
    assert rf"Fisher & {few.value:.1f}" in source and r"{\scriptsize (n = 4)}" in source
    assert source.count(r"\textbf{") == sum(
        (cell.mark == "best") for table in section.blocks[0].tables for line in table.lines for cell in line.cells
    ) + sum(line.total for table in section.blocks[0].tables for line in table.lines)
    assert "% Fisher has 4 of 30 cells." in source


def test_the_command_writes_latex(tmp_path: Path, examples: ModuleType) -> None:
    folder = examples.write_rows(tmp_path / "results", examples.partitions(seeds=(1,)))
    arguments = [str(folder), "-o", str(tmp_path / "t.md"), "--latex", str(tmp_path / "a.tex")]
    done = CliRunner().invoke(report_command, arguments, catch_exceptions=False)
    assert done.stdout.splitlines()[-2:] == [str(tmp_path / "t.md"), str(tmp_path / "a.tex")]
    CliRunner().invoke(report_command, [str(folder), "-o", str(tmp_path / "b.tex")], catch_exceptions=False)
    assert (tmp_path / "a.tex").read_bytes() == (tmp_path / "b.tex").read_bytes()
    both = [str(folder), "-o", str(tmp_path / "c.tex"), "--latex", str(tmp_path / "d.tex")]
    refused = CliRunner().invoke(report_command, both)
    assert refused.exit_code == 2 and "both name a file for latex" in refused.output


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_pdflatex_reads_it(tmp_path: Path, nasty: list[Section]) -> None:
    (tmp_path / "tables.tex").write_text(render_latex(nasty), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs,graphicx,longtable}\n"
        "\\begin{document}\n\\input{tables}\n\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
