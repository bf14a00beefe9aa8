"""What other tools call our methods and keys, so that a name from elsewhere is answered with ours."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from merganser.errors import did_you_mean

#: Names that methods have in papers and in other tools, spelled with underscores, and what they are called here.
METHODS_ELSEWHERE = {
    "linear": "simple",
    "average": "simple",
    "averaging": "simple",
    "mean": "simple",
    "weighted_average": "simple",
    "soup": "simple",
    "model_soup": "simple",
    "uniform_soup": "simple",
    "lerp": "simple",
    "ta": "task_arithmetic",
    "task_vectors": "task_arithmetic",
    "ties_merging": "ties",
    "dare": "dare_linear",
    "breadcrumbs_linear": "breadcrumbs",
    "model_breadcrumbs": "breadcrumbs",
    "tall_masks": "consensus",
    "consensus_ta": "consensus",
    "consensus_merging": "consensus",
    "fisher_merging": "fisher",
    "fisher_weighted": "fisher",
    "regression_mean": "regmean",
    "regmean_plus_plus": "regmean_pp",
    "regmean++": "regmean_pp",
    "optimal_transport": "ot",
    "ot_fusion": "ot",
    "tsv": "tsv_m",
    "tsv_merge": "tsv_m",
    "iso": "iso_c",
    "frankenmerge": "passthrough",
    "copy": "passthrough",
    "stock": "model_stock",
    "karcher_mean": "karcher",
    "frechet_mean": "karcher",
    "nearest_swap": "nearswap",
    "git_rebasin": "rebasin",
    "weight_matching": "rebasin",
    "activation_matching": "activations",
    "automatic": "auto",
    "best": "auto",
    "default": "auto",
    "recommended": "auto",
    "ties_svd": "ties",
    "dare_linear_svd": "dare_linear",
    "dare_ties_svd": "dare_ties",
}

#: Keys of other tools' recipes, and ours for the same.
KEYS_ELSEWHERE = {
    "models": "contributors",
    "weight": "coefficient",
    "weights": "coefficient",
    "parameters": "options",
    "merge_method": "method",
    "base_model": "base",
    "out_dtype": "dtype",
    "slices": "layers",
    "layer_range": "range",
    "filter": "tensors",
    "pattern": "tensors",
    "patterns": "tensors",
    "roles": "role",
    "tokenizer_source": "tokenizer_from",
    "tokenizer": "tokenizer_from",
}


def suggest_method(name: str, known: Collection[str], others: Sequence[str] = ()) -> str:
    """A mend for a method that is not known: what it is called here, or the nearest name.

    Args:
        name: as it was given.
        known: the methods that there are.
        others: names beside those of methods, such as ``auto``.
    """
    found = name_here(name, [*known, *others])
    if found is not None:
        return f"{name} is called {found} here"
    return did_you_mean(name, [*known, *others])


def name_here(name: str, known: Collection[str]) -> str | None:
    """What a method of another spelling, or with a name from elsewhere, is called here; None: nothing that is known."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    ours = METHODS_ELSEWHERE.get(plain, plain)
    joined = {one.replace("_", ""): one for one in known}
    return ours if ours in known else joined.get(ours.replace("_", ""))
