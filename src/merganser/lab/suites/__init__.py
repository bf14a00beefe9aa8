"""Suites: the data sets that experiments train, merge and score on; one file each, registered in one line below."""

from __future__ import annotations

from merganser.lab.suites.base import Suite
from merganser.lab.suites.emotion import Emotion
from merganser.lab.suites.emotion_generation import EmotionGPT2, EmotionT5
from merganser.lab.suites.glue import Glue
from merganser.lab.suites.ner import NER
from merganser.lab.suites.own_files import OwnFiles
from merganser.lab.suites.sentiment import Sentiment
from merganser.lab.suites.texts import Texts

#: Every suite by name.
SUITES: dict[str, type[Suite]] = {
    suite.name: suite for suite in (Emotion, EmotionT5, EmotionGPT2, NER, Glue, Sentiment, Texts, OwnFiles)
}
