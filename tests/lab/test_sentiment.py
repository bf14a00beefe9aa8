"""The sentiment sets: parsing, splits, hashes and the fetch, on small synthetic archives."""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from merganser.errors import DataError
from merganser.lab import sentiment
from merganser.lab.sentiment import Example, label_of, load_domains, parse_rows, read_archive, split
from merganser.lab.suites import SUITES
from merganser.lab.suites import sentiment as suite_module


def tar_of(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return stream.getvalue()


def rows(domain: str, count: int) -> bytes:
    lines = [f"{index}\t{(index % 9) - 4}\t{domain} text {index}" for index in range(count)]
    return "\r\n".join(lines).encode()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive as the real one, with 40 rows a domain, whose hashes are made the known ones."""
    return write_archive(tmp_path / "sdist.tar.gz", 40, monkeypatch)


def write_archive(path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    inner = tar_of({member: rows(name, count) for name, member in sentiment.MEMBERS.items()} | {"../evil.txt": b"x"})
    outer = tar_of({sentiment.INNER: inner, "other.txt": b"y"})
    monkeypatch.setattr(sentiment.read_archive, "__kwdefaults__", {
        "sha256": hashlib.sha256(outer).hexdigest(), "inner_sha256": hashlib.sha256(inner).hexdigest()
    })  # fmt: skip
    path.write_bytes(outer)
    return path


def load(archive: Path, **options: int) -> tuple[sentiment.Domain, ...]:
    return load_domains(archive=archive, **{"train": 20, "test": 10, "dev": 5, "seed": 1, **options})


def test_classes_lie_at_half_a_point() -> None:
    ratings = [-4, -0.51, -0.5, 0, 0.5, 0.51, 4]
    assert [sentiment.LABEL_NAMES[label_of(rating)] for rating in ratings] == [
        *("negative", "negative", "neutral", "neutral", "neutral", "positive", "positive")
    ]


def test_rows_with_crlf_spaces_and_odd_characters() -> None:
    content = "1_1\t-0.9\tnot  good\u2028at all\r\n\r\n1_2\t2.5\tcaf\u00e9 \u2014 fine".encode()
    assert parse_rows(content, where="x") == [
        Example("1_1", "not good at all", -0.9, 0),
        Example("1_2", "caf\u00e9 \u2014 fine", 2.5, 2),
    ]


@pytest.mark.parametrize("row", ["2\tgood", "2\tnone\tgood", "2\t1\t ", "2\t9\tgood", "2\tnan\tgood", "2\t1\ta\tb"])
def test_a_bad_row_is_named_by_its_line(row: str) -> None:
    with pytest.raises(DataError, match=r"tweets\.txt:2: "):
        parse_rows(f"1\t0\tfine\r\n{row}\r\n".encode(), where="tweets.txt")


def test_not_utf8() -> None:
    with pytest.raises(DataError, match="UTF-8"):
        parse_rows(b"1\t0\t\xff", where="x")


def test_splits_are_disjoint_and_seeded(archive: Path) -> None:
    domains = load(archive)
    assert [domain.name for domain in domains] == ["tweets", "movies", "amazon", "nyt"]
    for domain in domains:
        parts = [{example.text for example in part} for part in (domain.train, domain.dev, domain.test)]
        assert [len(part) for part in parts] == [20, 5, 10] and len(set.union(*parts)) == 35
        assert all(text.startswith(domain.name) for part in parts for text in part)
    assert load(archive) == domains
    assert load(archive, seed=2)[0].test != domains[0].test


def test_the_test_split_does_not_depend_on_the_size_of_the_others(archive: Path) -> None:
    large, small = load(archive), load(archive, train=7, dev=1)
    for left, right in zip(large, small, strict=True):
        assert left.test == right.test and left.train[:7] == right.train


def test_repeated_texts_appear_once_also_across_domains() -> None:
    seen: set[str] = set()
    first = sentiment.without_repeats([Example("1", "Same", 1, 2), Example("2", "same", -1, 0)], seen)
    second = sentiment.without_repeats([Example("9", "SAME", 1, 2), Example("8", "new", 0, 1)], seen)
    assert [example.identifier for example in first + second] == ["1", "8"]


def test_too_few_texts() -> None:
    with pytest.raises(DataError, match="tweets has 1 distinct texts, too few for 2 train"):
        split("tweets", [Example("1", "a", 0, 1)], train=2, test=0, dev=0, seed=1)


def test_another_hash_is_refused(archive: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.tar.gz"
    damaged.write_bytes(archive.read_bytes() + b"0")
    with pytest.raises(DataError, match=r"sha256 is .* but must be"):
        read_archive(damaged)
    with pytest.raises(DataError, match=f"sha256 .*{sentiment.SDIST_SHA256}"):
        read_archive(archive, sha256=sentiment.SDIST_SHA256)


def test_a_link_in_place_of_a_member_is_not_followed(tmp_path: Path) -> None:
    inner = tar_of(
        dict.fromkeys(list(sentiment.MEMBERS.values())[1:], b"1\t0\tx"),
        links={sentiment.MEMBERS["tweets"]: "/etc/hostname"},
    )
    outer = tar_of({sentiment.INNER: inner})
    path = tmp_path / "a.tar.gz"
    path.write_bytes(outer)
    with pytest.raises(DataError, match=r"lacks .*tweets"):
        read_archive(path, sha256=hashlib.sha256(outer).hexdigest(), inner_sha256=hashlib.sha256(inner).hexdigest())


def test_not_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(b"no tar")
    with pytest.raises(DataError, match="not a readable tar"):
        read_archive(path, sha256=hashlib.sha256(b"no tar").hexdigest())


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None, error: str = "") -> list[list[str]]:
    """Replace the run of pip: it saves ``content``, or fails."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
        calls.append(command)
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirements == f"vaderSentiment==3.3.2 --hash=sha256:{sentiment.SDIST_SHA256}\n"
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / sentiment.SDIST).write_bytes(content)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", error)

    monkeypatch.setattr(sentiment.subprocess, "run", run)
    return calls


def test_fetched_once_then_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sentiment, "SDIST_SHA256", hashlib.sha256(b"archive").hexdigest())
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    calls = fake_pip(monkeypatch, b"archive")
    assert sentiment.fetch() == sentiment.fetch() == tmp_path / "cache" / sentiment.SDIST
    assert len(calls) == 1 and calls[0][:3] == [sys.executable, "-m", "pip"]
    (tmp_path / "cache" / sentiment.SDIST).write_bytes(b"damaged")
    assert sentiment.fetch().read_bytes() == b"archive" and len(calls) == 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [sentiment.SDIST]


def test_a_failed_or_wrong_fetch_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, None, "ERROR: no route to host")
    with pytest.raises(DataError, match=r"no route to host\n.*to mend: .*pip download vaderSentiment==3\.3\.2"):
        sentiment.fetch(tmp_path / "cache")
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(DataError, match="sha256"):
        sentiment.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_suite_has_the_same_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path / sentiment.SDIST, 2100, monkeypatch)
    suite = SUITES["sentiment"](tmp_path)
    assert suite.sets() == ("amazon", "movies", "nyt", "tweets")
    domain = next(domain for domain in load_domains(archive=archive) if domain.name == "nyt")
    for name, examples in (("train", domain.train), ("dev", domain.dev), ("test", domain.test)):
        read = suite.read("nyt", name)
        assert [row["text"] for row in read] == [example.text for example in examples]
        assert {row["label"] for row in read} == set(suite.labels("nyt")) == set(sentiment.LABEL_NAMES)
    assert suite.metric("nyt") == "macro_f1"
    other = SUITES["sentiment"](tmp_path, split_seed=2).read("nyt", "test")
    assert [row["text"] for row in other] != [row["text"] for row in suite.read("nyt", "test")]
    with pytest.raises(DataError, match=rf"(?s)no source distribution.*put {sentiment.SDIST} .* there"):
        SUITES["sentiment"](tmp_path / "elsewhere").read("nyt", "test")


def test_a_failed_fetch_is_not_tried_for_every_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    calls = fake_pip(monkeypatch, None, "ERROR: no route to host")
    suite_module._fetched.cache_clear()
    for split_name in ("train", "dev", "test"):
        with pytest.raises(DataError, match="no route to host"):
            SUITES["sentiment"]().read("tweets", split_name)
    assert len(calls) == 1
    suite_module._fetched.cache_clear()


def test_the_real_sets_where_they_are_cached() -> None:
    cached = sentiment.cache_folder() / sentiment.SDIST
    if not cached.is_file():
        pytest.skip("the vaderSentiment source distribution is not in the cache: set MERGANSER_CACHE to run this")
    domains = load_domains()
    sizes = [(len(domain.train), len(domain.dev), len(domain.test)) for domain in domains]
    assert sizes == [(1200, 300, 600)] * 4
    texts = [example.text.casefold() for d in domains for part in (d.train, d.dev, d.test) for example in part]
    assert len(texts) == len(set(texts)) == 8400
    assert all({example.label for example in domain.test} == {0, 1, 2} for domain in domains)
