"""What strangers wrote comes out as text wherever it is shown: in a terminal, in rich's tables and in Markdown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merganser.cli.common import print_table, tell, warn
from merganser.text import code, markdown, printable, shortened


@given(st.text())
def test_printable_text_is_printable_and_can_be_read_back(text: str) -> None:
    shown = printable(text)
    assert shown.replace("\xa0", " ").isprintable()
    assert printable(shown) == shown
    assert shown == text or len(shown) > len(text)


def test_text_that_can_be_seen_stays() -> None:
    for text in ("grün 日本語 देवनागरी 🦆", "a\xa0b", "", "C:\\x1b"):
        assert printable(text) == text
    assert printable("a\n\tb\x1b[2J", lines=True) == "a\n\tb\\x1b[2J"
    assert printable(5) == "5"


@given(st.text(), st.integers(10, 50))
def test_shortened_text_has_beginning_and_end(text: str, limit: int) -> None:
    shown = shortened(text, limit)
    assert len(shown) <= limit
    assert shown == text if len(text) <= limit else shown[0] == text[0] and shown[-1] == text[-1]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a | b", "a \\| b"),
        ("[x](javascript:alert(1))", "\\[x\\](javascript:alert(1))"),
        ("<img src=x onerror=alert(1)>", "\\<img src=x onerror=alert(1)\\>"),
        ("`code`", "\\`code\\`"),
        ("a\n\n---\nlicense: mit\n---", "a\\\\n\\\\n---\\\\nlicense: mit\\\\n---"),
        ("a\n# head", "a\\\\n# head"),
        ("# head", "\\# head"),
        ("- item", "\\- item"),
        ("12. item", "12\\. item"),
        ("--- front", "\\--- front"),
        ("*a* **b** _c_ ~~d~~", "\\*a\\* \\*\\*b\\*\\* \\_c\\_ \\~\\~d\\~\\~"),
        ("$$x$$ &lt;", "\\$\\$x\\$\\$ \\&lt;"),
        ("https://a.b www.a.b", "https:\\//a.b www\\.a.b"),
        ("bert.encoder.layer_norm.weight of org/some-model_v2 (1e-5, 12 %)", None),
    ],
)
def test_names_are_no_markdown(text: str, shown: str | None) -> None:
    assert markdown(text) == (text if shown is None else shown)


def test_code_stays_within_its_backticks() -> None:
    assert code("a") == "`a`"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`") == "`` ` ``"
    assert code("a\n\nb") == "`a\\n\\nb`"


NAMES = (
    "[/b]",
    "[bold]x",
    "\x1b[31mred",
    "a\nb",
    "\u202eabc",
    "[link=https://a.b]x[/link]",
    "\ud800",
    ":duck:",
    "\\[",
    "",
)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_is_printed_is_markup_or_steers_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(name, [name, "b"], [[name, "1"], ["x", name]])
    warn(name)
    tell(name)
    seen = capsys.readouterr()
    assert seen.out.count(printable(name)) >= 5 and printable(name) in seen.err
    assert (seen.out + seen.err).replace("\n", "").isprintable()
