"""What a command may replace, and where it cannot write, whatever the command."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from merganser.errors import FileError
from merganser.files import Output, Refusal, files_below, is_within, real_files, unlisted, write_text

OURS = {"config.json", "heads/a/weights"}


def recognise(path: Path) -> Refusal | None:
    if path.is_dir():
        return unlisted(files_below(path), OURS, "the merge")
    return None if path.read_text() == "ours" else Refusal("the output is no report")


def output(path: Path, reads: Iterable[Path] = (), *, overwrite: bool = True, folder: bool = True, **more: object):
    return Output(path, recognise, overwrite, tuple(reads), folder=folder, **more)


def refused(place: Output, what: str) -> None:
    """Refused before work, and again at the end, with everything as it was."""
    (problem,) = place.problems()
    assert isinstance(problem, FileError) and what in problem.what and problem.mend, problem
    with pytest.raises(FileError) as error:
        place.raise_problem()
    assert str(error.value) == str(problem)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file with its text, every link with its target, every folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        text = str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else "folder"
        found[path.relative_to(folder).as_posix()] = text
    return found


def filled(folder: Path, *names: str) -> Path:
    for name in names or OURS:
        write_text(folder / name, name)
    return folder


def write(place: Output) -> None:
    with place.new() as work:
        if place.folder:
            write_text(work / "config.json", "new")
        else:
            work.write_text("new")


def test_our_own_output_is_replaced_when_asked_for(tmp_path: Path) -> None:
    out = filled(tmp_path / "out")
    refused(output(out, overwrite=False), "the output exists")
    with pytest.raises(FileError, match="the output exists"):
        write(output(out, overwrite=False))
    assert len(list(files_below(out))) == 2
    place = output(out)
    assert place.problems() == []
    write(place)
    assert snapshot(tmp_path) == {"out": "folder", "out/config.json": "new"}
    (tmp_path / "empty").mkdir()
    write(output(tmp_path / "empty"))
    page = write_text(tmp_path / "page", "ours")
    write(output(page, folder=False))
    assert page.read_text() == (tmp_path / "empty" / "config.json").read_text() == "new"


@pytest.mark.parametrize("name", ["thesis.docx", "heads/b/weights", "heads/a/.hidden", ".git/config", "a/b/c/d"])
def test_what_else_lies_in_it_is_named_and_kept(tmp_path: Path, name: str) -> None:
    out = filled(tmp_path / "out", *OURS, name)
    before = snapshot(tmp_path)
    refused(output(out), f"what is no part of the merge: {name}")
    with pytest.raises(FileError, match="no part of the merge"):
        write(output(out))
    assert snapshot(tmp_path) == before


def test_links_sockets_and_many_files_in_it_are_kept(tmp_path: Path) -> None:
    elsewhere = filled(tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data").symlink_to(elsewhere)
    refused(output(tmp_path / "out"), "data")
    os.mkfifo(tmp_path / "out" / "pipe")
    refused(output(tmp_path / "out"), "data, pipe")
    refused(output(filled(tmp_path / "many", *(f"{n:02}" for n in range(40)))), "00, 01, 02, 03, 04 and 35 more")


def test_what_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """Before the work there was nothing, or nothing else."""
    for there in (True, False):
        out = tmp_path / f"out-{there}"
        if there:
            filled(out)
        place = output(out)
        assert place.problems() == []
        with pytest.raises(FileError, match="thesis"), place.new() as work:
            write_text(work / "config.json", "new")
            write_text(out / "thesis", "mine")
        assert (out / "thesis").read_text() == "mine" and (out / "config.json").exists() == there
    page = tmp_path / "page"
    with pytest.raises(FileError, match="no report"), output(page, folder=False).new() as work:
        work.write_text("new")
        page.write_text("mine")
    assert page.read_text() == "mine" and len(list(tmp_path.iterdir())) == 3


def test_files_and_folders_do_not_replace_each_other(tmp_path: Path) -> None:
    refused(output(write_text(tmp_path / "file", "ours")), "is a file")
    refused(output(filled(tmp_path / "folder"), folder=False), "is a folder")
    (tmp_path / "empty").mkdir()
    refused(output(tmp_path / "empty", folder=False), "is a folder")


@pytest.mark.parametrize("target", ["out", "page", "nothing"])
def test_links_are_not_replaced(tmp_path: Path, target: str) -> None:
    filled(tmp_path / "out")
    write_text(tmp_path / "page", "ours")
    link = tmp_path / "link"
    link.symlink_to(target)
    refused(output(link, folder=target == "out"), f"the output is a link to {target}")
    with pytest.raises(FileError):
        write(output(link, folder=target == "out"))
    assert link.is_symlink() and (tmp_path / "page").read_text() == "ours"


# ── what is read ──


def ways(path: Path, tmp_path: Path) -> list[Path]:
    """Names of one place."""
    link = tmp_path / "link"
    if not link.is_symlink():
        link.symlink_to(path.parent)
    found = [path, Path(os.path.relpath(path)), path.parent / "x" / ".." / path.name, link / path.name]
    (path.parent / "x").mkdir(exist_ok=True)
    if (upper := path.with_name(path.name.upper())).exists():  # where case does not count
        found.append(upper)
    return found


def test_what_is_read_and_what_holds_it_or_lies_in_it_is_never_written(tmp_path: Path) -> None:
    run = tmp_path / "place" / "run"
    model = filled(run / "checkpoint-1")
    for path in ways(run, tmp_path):
        for read in (model, model / "config.json"):
            refused(output(path, [tmp_path / "other", read]), f"the output holds {read}, which is read")
            refused(output(read, [path / read.relative_to(run)], folder=read.is_dir()), "one of the inputs")
        for inside in (path / "merged", path / "a" / "b", path / "checkpoint-1"):
            refused(output(inside, [path]), f"the output lies in {path}, which is read")
            refused(output(inside, [path], overwrite=False), f"the output lies in {path}, which is read")
    refused(output(tmp_path, [model]), "which is read")
    refused(output(Path("/"), [model]), "which is read")
    assert output(run / "merged", [model]).problems() == []  # beside it
    assert output(tmp_path / "place" / "run2", [run]).problems() == []


def test_the_current_folder_by_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(tmp_path / "run" / "checkpoint-1")
    monkeypatch.chdir(tmp_path / "run")
    for name in (".", "", "../run", "checkpoint-1/..", "./."):
        refused(output(Path(name), [model]), "which is read")
        refused(output(Path(name)), "no part of the merge: checkpoint-1/config.json")
    monkeypatch.chdir(filled(tmp_path / "out"))
    write(output(Path("heads/..")))
    assert snapshot(tmp_path / "out") == {"config.json": "new"}


def test_hard_links_and_links_out_of_a_folder_that_is_read(tmp_path: Path) -> None:
    data = write_text(tmp_path / "data" / "rows.jsonl", "ours")
    (tmp_path / "same").hardlink_to(data)
    refused(output(tmp_path / "same", [data], folder=False), "one of the inputs")
    blobs = filled(tmp_path / "blobs", "config.json")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to(blobs / "config.json")
    refused(output(blobs, real_files(model)), f"the output holds {blobs / 'config.json'}")


def test_what_may_be_written_into_or_replaced_all_the_same(tmp_path: Path) -> None:
    model = filled(tmp_path / "model")
    inside = model / "statistics"
    refused(output(inside, [model], folder=False), "the output lies in")
    assert output(inside, [model], folder=False, allowed=[model]).problems() == []
    refused(output(tmp_path, [model], allowed=[model]), "which is read")  # it goes with the folder that holds it
    page = write_text(tmp_path / "page", "ours")
    refused(output(page, [page], folder=False), "one of the inputs")
    write(output(page, [page], folder=False, allowed=[page]))


# ── names and places ──


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a\0b", "control characters"),
        ("a\nb", "control characters"),
        ("\x1b[31mred", "control characters"),
        ("x" * 256, "too long: 256 bytes"),
        ("ü" * 128, "too long: 256 bytes"),
        ("x" * 300 + "/out", "too long: 300 bytes"),
        ("/".join(["x" * 200] * 20), "too long: 4"),
        ("file/out", "is a file"),
        ("file/a/b", "is a file"),
        ("dangling", "a link to nowhere, where nothing is"),
        ("dangling/out", "a link to nowhere, where nothing is"),
        ("dangling/a/out", "a link to nowhere, where nothing is"),
        ("loop", "a link to loop"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_work(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = snapshot(tmp_path)
    for folder in (True, False):
        for overwrite in (True, False):
            refused(output(tmp_path / name, overwrite=overwrite, folder=folder), what)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("url", ["s3://bucket/out", "file:///tmp/out", "memory://out", "hf:///x"])
def test_a_url_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (True, False):
        refused(output(Path(url), folder=folder), "looks like a URL")
    assert not list(tmp_path.iterdir())
    Path(Path(url).parts[0]).mkdir()  # somebody's folder of that name is one
    assert output(Path(url)).problems() == []


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "out put", "größe", "-o", "'\"", "[b]"])
def test_names_that_are_unusual_work(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        place = output(tmp_path / name)
        assert place.problems() == []
        write(place)
    assert snapshot(tmp_path) == {name: "folder", f"{name}/config.json": "new"}


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    refused(output(tmp_path / "a" / "b"), f"the folder {tmp_path} is not writable")


@pytest.mark.skipif(sys.platform != "linux", reason="case does not count elsewhere")
def test_is_within(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert is_within(tmp_path / "a", tmp_path / "a") and is_within(tmp_path / "a" / "none" / "x", tmp_path / "a")
    assert not is_within(tmp_path / "a", tmp_path / "a" / "b") and not is_within(tmp_path / "ab", tmp_path / "a")
    assert not is_within(tmp_path / "none", tmp_path / "nothing")
    shutil.rmtree(tmp_path / "a")
    assert is_within(tmp_path / "a" / "b", tmp_path / "a")
