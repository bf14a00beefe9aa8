"""The zoo: trained models found by what they were made from, with what was made from them.

    zoo = Zoo(default_zoo())
    entry = zoo.build({"suite": "emotion", "set": "isear", "seed": 1}, train_into)   # trained once
    statistics = zoo.attach(entry, "statistics/ab12cd.safetensors", collect_into)    # collected once

A zoo is a folder, or a place that fsspec knows (``s3://bucket/prefix``) with a local cache:

    <zoo>/<id>/entry.json       written last: without it there is no entry
    <zoo>/<id>/model/…          the model folder
    <zoo>/<id>/statistics/…     files beside the model, each with its <name>.record.json
"""

from merganser.lab.zoo.keys import ZooError, id_of
from merganser.lab.zoo.record import Entry
from merganser.lab.zoo.store import Zoo, default_zoo

__all__ = ["Entry", "Zoo", "ZooError", "default_zoo", "id_of"]
