"""What a model must be above to have learnt: python majority.py SUITE NAME=VALUE…, as in `merganser benchmark`.

For each contributor's data set the score of the label that most training texts have, predicted for every text of the
test. A text has one label (sentiment, GLUE) or several (emotion); what has none, such as STS-B, is left out.
"""

import sys

import numpy as np

from merganser.lab.grid.data import Data
from merganser.lab.grid.loading import load_config
from merganser.lab.suites.base import TEST, TRAIN

config = load_config([sys.argv[1]], templates=dict(given.split("=", 1) for given in sys.argv[2:]))
data = Data(config.suite)
sys.stdout.write(f"| {config.name} | the most frequent label | score of it alone |\n|---|---|---:|\n")
for name in dict.fromkeys(map(config.set_of, config.contributors)):
    task, space = data.suite.task(name), data.space(name)
    if task.problem not in ("classification", "multi_label"):
        continue
    marks = np.asarray(data.truth(name, TRAIN))
    if task.problem == "classification":
        marks = np.eye(len(space))[marks]
    most = int(np.nansum(marks, axis=0).argmax())
    truth = data.truth(name, TEST)
    logits = np.where(np.arange(len(space)) == most, 10.0, -10.0) * np.ones((len(truth), 1))
    score = task.score(task.judge(logits, truth, space))[data.suite.metric(name)]
    sys.stdout.write(f"| {name} | {space.names[most]} | {100 * score:.1f} |\n")
