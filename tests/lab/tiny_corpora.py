"""Tiny corpora in the layouts in which the real ones are published: a few dozen rows each, whose words tell the truth.

    resources = write_resources(folder)      folder/{emotion_splits,ner,glue}
    texts()                                  every text of them, to train a tokenizer on

Every corpus has words of its own beside those that all share, so that a model shows which corpora it has seen. The
same call writes the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

EMOTIONS = (
    "joy", "anger", "sadness", "disgust", "fear", "trust", "surprise", "love", "noemo", "confusion", "anticipation",
    "shame", "guilt",
)  # fmt: skip
VAD = ("valence", "arousal", "dominance")
_SIX = ("joy", "anger", "sadness", "disgust", "fear", "surprise")
_PLUTCHIK = (*_SIX, "trust", "anticipation")

#: What each corpus annotates, and the words that are its own. All else is null in its files.
EMOTION_SETS: dict[str, tuple[tuple[str, ...], str]] = {
    "dailydialog": ((*_SIX, "noemo"), "Well , sir , madam please"),
    "crowdflower": ((*_SIX, "love", "noemo"), "@friend lol omg bedtime"),
    "tec": (_SIX, "#today rt tweet hashtag"),
    "tales-emotion": ((*_SIX, "noemo"), "princess castle frog forest"),
    "isear": (("joy", "anger", "sadness", "disgust", "fear", "shame", "guilt"), "exam brother teacher student"),
    "emoint": (("joy", "anger", "sadness", "fear"), "intensity tweeting"),
    "ssec": (_PLUTCHIK, "#SemST stance"),
    "electoraltweets": (_PLUTCHIK, "ballot candidate"),
    "grounded_emotions": (("joy", "sadness"), "weather outside"),
    "affectivetext": ((*_SIX, "valence"), "headline newspaper"),
}
_GRADED = ("emoint", "affectivetext")  # these annotate how much, from 0 to 1
_MOODS = {
    "joy": "happy glad", "anger": "angry furious", "sadness": "sad crying", "disgust": "gross nasty",
    "fear": "scared afraid", "trust": "trusted faithful", "surprise": "sudden wow", "love": "darling kiss",
    "noemo": "table chair", "anticipation": "waiting tomorrow", "shame": "ashamed blushing", "guilt": "guilty sorry",
    "valence": "pleasant fine",
}  # fmt: skip

GENRES = ("bc", "mz", "tc", "nw", "bn", "wb")
#: Words of each genre; the last are those of the out-of-domain sets.
_SOURCES = {
    "bc": "host show", "mz": "magazine issue", "tc": "uh yeah", "nw": "shares percent", "bn": "tonight anchor",
    "wb": "blog post", "conll2003": "1996 match", "twitter": "@user lol",
}  # fmt: skip
_NAMES = {
    "PERSON": ("Anna Smith", "Peter", "Maria Jones", "Tom"),
    "ORG": ("Acme Bank", "United Steel Corp", "Globex"),
    "LOC": ("North Sea", "Alps", "Paris"),
    "GPE": ("France", "New York"),
    "DATE": ("last Monday", "Friday"),
    "MISC": ("British", "World Cup"),
}
_SENTENCES = ("{0} lives near {1} .", "Yesterday {0} met {1} -LRB- again -RRB- .", "The people of {0} saw it .")

GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "mnli", "qnli", "qqp", "rte", "wnli")
#: The columns of each task, the words of its own, and a word for each class.
_GLUE: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "cola": (("sentence",), "grammar linguist syntax", ("them is", "they are")),
    "sst2": (("sentence",), "movie film acting", ("awful boring", "great funny")),
    "mrpc": (("sentence1", "sentence2"), "police stocks reported", ("unrelated", "likewise")),
    "stsb": (("sentence1", "sentence2"), "guitar plane playing", ()),
    "mnli": (("premise", "hypothesis"), "fiction letters travel", ("therefore", "perhaps", "never")),
    "qnli": (("question", "sentence"), "What century river", ("answering", "missing")),
    "qqp": (("question1", "question2"), "How quora learn", ("otherwise", "similarly")),
    "rte": (("sentence1", "sentence2"), "minister hospital economy", ("implies", "denies")),
    "wnli": (("sentence1", "sentence2"), "trophy suitcase pronoun", ("wrongly", "rightly")),
}
_COMMON = "the a I it was is in and then very really of".split()  # noqa: SIM905


def write_resources(root: Path) -> Path:
    """Write ``emotion_splits``, ``ner`` and ``glue`` below ``root``, which is returned."""
    for name in EMOTION_SETS:
        for split in ("train", "dev", "test"):
            _write_lines(root / "emotion_splits" / name / f"{split}.jsonl", emotion_rows(name, split))
    for genre in GENRES:
        for split in ("train", "development", "test"):
            path = root / "ner" / f"onto.{split}.{genre}.ner"
            _write(path, _conll(tagged(genre, split), "\t", "(TOP*"))
    for split, name in (("train", "eng.train"), ("dev", "eng.testa"), ("test", "eng.testb")):
        sentences = [(words, _as_iob1(tags)) for words, tags in tagged("conll2003", split)]
        _write(root / "ner" / "conll2003" / name, "-DOCSTART- -X- O O\n\n" + _conll(sentences, " ", "I-NP"))
    for split in ("train", "dev", "test"):
        _write_lines(root / "ner" / "twitter" / f"{split}.json", _tweets(split))
    for task in GLUE_TASKS:
        for split in ("train", "validation_matched" if task == "mnli" else "validation"):
            _write_lines(root / "glue" / task / f"{split}.jsonl", glue_rows(task, split))
    return root


def texts() -> list[str]:
    """The texts of all corpora, for the training of tokenizers."""
    found = [row["text"] for name in EMOTION_SETS for row in emotion_rows(name, "train")]
    found += [" ".join(words) for source in _SOURCES for words, _ in tagged(source, "train")]
    for task in GLUE_TASKS:
        found += [row[column] for row in glue_rows(task, "train") for column in _GLUE[task][0]]
    questions = [f"does the sentence express {label}? yes" for label in (*EMOTIONS, *VAD)]
    statements = [f"The sentence expresses {label}. no" for label in (*EMOTIONS, *VAD)]
    return found + questions + statements


def emotion_rows(name: str, split: str) -> list[Row]:
    """The records of a corpus: each text has the words of its emotions, and null for what is not annotated."""
    draw, (labels, own) = random.Random(f"{name}/{split}"), EMOTION_SETS[name]
    in_domain = name in list(EMOTION_SETS)[:5]
    rows = []
    for number in range({"train": 60, "dev": 16, "test": 24}[split] if in_domain else 8):
        chosen = draw.sample(labels, draw.randint(1, min(3, len(labels))))
        words = [word for label in chosen for word in _MOODS[label].split()] * 2
        words += draw.choices(own.split(), k=2) + draw.choices(_COMMON, k=draw.randint(1, 4))
        if number % 10 == 9:  # some texts are cut at a small maximum length
            words += draw.choices(_COMMON, k=30)
        draw.shuffle(words)
        marks = {label: _mark(label in chosen, name in _GRADED, draw) for label in labels}
        rows.append(
            {
                "source": name,
                "text": " ".join(words),
                "split": split,
                "emotions": {label: marks.get(label) for label in EMOTIONS},
                "VAD": {label: marks.get(label) for label in VAD},
            }
        )
    return rows


def _mark(present: bool, graded: bool, draw: random.Random) -> float:
    """1 or 0; where a corpus says how much, more than 0.1 or (for what is not there) at most 0.1."""
    if not graded:
        return int(present)
    return round(draw.uniform(0.2, 1) if present else draw.choice([0, 0.05, 0.1]), 3)


def tagged(source: str, split: str) -> list[tuple[list[str], list[str]]]:
    """Sentences of a genre or set: words with treebank escapes, and BIO tags over the types of its corpus."""
    draw = random.Random(f"{source}/{split}")
    onto = source in GENRES
    kinds = ["PERSON", "ORG", "LOC", "GPE", "DATE"] if onto else ["PER", "ORG", "LOC", "MISC"]
    found = []
    for number in range({"train": 40}.get(split, 20)):
        words, tags = [], []
        for word in draw.choice(_SENTENCES).split():
            if word.startswith("{"):
                kind = draw.choice(kinds)
                name = draw.choice(_NAMES["PERSON" if kind == "PER" else kind]).split()
                words += name
                tags += [f"B-{kind}", *[f"I-{kind}"] * (len(name) - 1)]
            else:
                words.append(word)
                tags.append("O")
        extra = draw.choices(_SOURCES[source].split(), k=25 if number % 10 == 9 else 2)
        words, tags = [*extra, *words], [*["O"] * len(extra), *tags]
        if number % 4 == 1:  # two entities of one type, one directly after the other
            kind = kinds[0]
            words += ["Peter", "Anna", "Smith"]
            tags += [f"B-{kind}", f"B-{kind}", f"I-{kind}"]
        found.append((words, tags))
    return found


def _as_iob1(tags: Sequence[str]) -> list[str]:
    """``B-`` only where an entity directly follows another one of its type, as in CoNLL-2003's files."""
    before = ["O", *tags[:-1]]
    return [
        "I" + tag[1:] if tag[0] == "B" and tag[2:] != last[2:] else tag for last, tag in zip(before, tags, strict=True)
    ]


def _conll(sentences: Sequence[tuple[list[str], list[str]]], separator: str, parse: str) -> str:
    """Four columns: word, part of speech, parse or chunk, tag."""
    return "".join(
        "".join(separator.join((word, "NN", parse, tag)) + "\n" for word, tag in zip(words, tags, strict=True)) + "\n"
        for words, tags in sentences
    )


def _tweets(split: str) -> Iterator[Row]:
    for number, (words, tags) in enumerate(tagged("twitter", split)):
        yield {
            "text": " ".join(words),
            "id": f"btc-{split}-{number}",
            "entities": [],
            "labels": tags,
            "tokens": words,
            "domain": "TWT",
        }


def glue_rows(task: str, split: str) -> list[Row]:
    """The rows of a task; the class can be told from a word in the last of its columns, STS-B's score by counting."""
    draw, (columns, own, marks) = random.Random(f"{task}/{split}"), _GLUE[task]
    rows = []
    for number in range(70 if split == "train" else 30):
        label: int | float = draw.choices(range(len(marks)), range(1, len(marks) + 1))[0] if marks else 0
        if task == "stsb":
            count = draw.randint(0, 5)
            mark, label = " ".join(["same"] * count + ["other"] * (5 - count)), float(count)
        else:
            mark = marks[int(label)]
        row: Row = {}
        for column in columns:
            words = draw.choices(own.split(), k=2) + draw.choices(_COMMON, k=draw.randint(2, 5))
            if number % 10 == 9:
                words += draw.choices(_COMMON, k=20)
            row[column] = " ".join([*words, mark] if column == columns[-1] else words)
        rows.append({**row, "label": label, "idx": number})
    return rows


def _write_lines(path: Path, rows: Any) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
