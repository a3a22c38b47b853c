"""Features as Neuronpedia's batch files: the JSON that SAEDashboard writes and Neuronpedia's converter reads.

The folder holds ``batch-0.json``, ``batch-1.json``, ..., each

    {"model_id": "ts-nano", "layer": 2, "sae_set": "mlp-out-x4-k20", "sae_id_suffix": null, "features": [...]}

and each feature

    feature_index                                  its number
    frac_nonzero                                   share of the tokens at which it fires, 0 to 1; 0 if it is dead
    freq_hist_data_bar_values, ..._bar_heights     centres and counts of the histogram of its activations, without 0
    logits_hist_data_bar_values, ..._bar_heights   the same for its effects on the logits of all tokens
    pos_str, pos_values, neg_str, neg_values       the tokens most raised and most lowered, and by how many logits
    activations                                    [{"tokens", "values", "qualifying_token_index", "bin_min", "bin_max",
                                                   "bin_contains"}]: contexts, and which token each is about. The
                                                   largest come first, with -1 as bin_min and bin_contains. Samples of
                                                   lower ranges follow, with the share of all tokens in the range
    n_prompts_total, n_tokens_in_prompt, dataset   number of rows, tokens in a row, and name of the dataset
    neuron_alignment_*, correlated_neurons_*, correlated_features_*, decoder_weights_dist, vector      left empty

Numbers have 4 significant digits.

Source: ``NeuronpediaDashboardBatch`` in ``sae_dashboard/neuronpedia/neuronpedia_dashboard.py`` of sae-dashboard 0.8.0;
and ``utils/neuronpedia-utils/neuronpedia_utils/convert-saedashboard-to-neuronpedia-export.py`` of Neuronpedia, which
reads all files of a folder with names that begin with ``batch-``.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from bilinear_jax.explain.logits import direct_effects
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE
from bilinear_jax.pages.activity import significant
from bilinear_jax.pages.facts import Activity, ContextGroup, TokenEffect
from bilinear_jax.store.files import Kind, Place, atomic_folder, check_place

FORMAT = "bilinear_jax neuronpedia/1"
RECORD = "neuronpedia.json"
KIND = Kind(RECORD, FORMAT)
LOGIT_BARS = 50  # bars of the histogram of logits, as in SAEDashboard
EMPTY = (
    *(f"neuron_alignment_{part}" for part in ("indices", "values", "l1")),
    *(f"correlated_{kind}_{part}" for kind in ("neurons", "features") for part in ("indices", "l1", "pearson")),
    "decoder_weights_dist",
    "vector",
)
"""Fields that a feature must have. Neuronpedia shows nothing for them if they are empty."""


def export(
    lm: LanguageModel,
    sae: SAE,
    activities: Sequence[Activity],
    out: Path | str | Place,
    *,
    dataset: str,
    rows: int,
    tokens_per_row: int,
    model_id: str | None = None,
    set_name: str | None = None,
    features_per_file: int = 128,
    force: bool = False,
) -> Path:
    """Write the features of one SAE as Neuronpedia's batch files. The same facts give the same bytes.

    Then run Neuronpedia's own ``convert-saedashboard-to-neuronpedia-export.py --saedashboard-output-dir OUT`` with this
    ``model_id`` and set. It makes the files that Neuronpedia's database imports. There the source has the name
    ``<layer>-<set>``, which by default is the name of the SAE.

    Args:
        lm: the model.
        sae: the SAE of these features.
        activities: what each feature does, as ``gather`` finds it: ``[page.activity for page in site.outputs]``.
            ``PageOptions`` sets the length and the number of contexts. A dead feature is written without activations.
        out: the folder; it must not exist, or it must be empty. Or a place that ``check_place`` returned earlier.
        dataset, rows, tokens_per_row: name and size of the dataset of the activities.
        model_id: by default the last part of ``lm.source``.
        set_name: by default the SAE's name without its layer.
        features_per_file: number of features in a batch file; 128 in Neuronpedia's example.
        force: replace an older export.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: if the folder is not empty and ``force`` is off, or if it holds something else than an export;
            or if it changed meanwhile, as ``atomic_folder``.
        ValueError: if there is no feature, or one is given twice; if a number is not finite; if the model has no name;
            or if a count is below 1.
        UnknownNameError: for a feature that the SAE does not have.

    Example:
        >>> import tempfile
        >>> import bilinear_jax as bj
        >>> from bilinear_jax.pages.facts import Histogram
        >>> lm, sae = bj.load("ts-nano"), bj.load_sae("ts-nano", site="mlp-out", layer=2)
        >>> dead = Activity(7, 0.0, 0.0, [], ContextGroup(0.0, 0.0, 0.0, []), [], Histogram([], []), [], [])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = export(lm, sae, [dead], Path(folder) / "np", dataset="corpus", rows=512, tokens_per_row=256)
        ...     batch = json.loads((out / "batch-0.json").read_text())
        >>> batch["sae_set"] == sae.name.removeprefix("2-"), batch["features"][0]["frac_nonzero"]
        (True, 0.0)
    """
    from tqdm.auto import tqdm

    if min(features_per_file, rows, tokens_per_row) < 1:
        raise ValueError(
            f"features_per_file, rows and tokens_per_row must be at least 1, got {features_per_file}, {rows} and "
            f"{tokens_per_row}"
        )
    if model_id is None:
        if lm.source is None:
            raise ValueError("this model was not loaded from a folder, so it has no name: pass model_id=")
        model_id = Path(lm.source).name
    _check_features(sae, activities)
    set_name = sae.name.removeprefix(f"{sae.config.layer}-") if set_name is None else set_name
    of_dataset = {"n_prompts_total": rows, "n_tokens_in_prompt": tokens_per_row, "dataset": dataset}
    source = {"model_id": model_id, "layer": sae.config.layer, "sae_set": set_name, "sae_id_suffix": None}

    place = check_place(out, replace=KIND if force else None)
    with (
        atomic_folder(place) as folder,
        tqdm(total=len(activities), desc="Neuronpedia", disable=None) as bar,
    ):
        for number, start in enumerate(range(0, len(activities), features_per_file)):
            features = []
            for activity in activities[start : start + features_per_file]:
                effects = np.asarray(_effects(lm, sae, activity.feature), np.float64)
                features.append(feature_json(activity, effects) | of_dataset)
                bar.update()
            _write(folder / f"batch-{number}.json", source | {"features": features})
        listed = [activity.feature for activity in activities]
        _write(folder / RECORD, {"format": FORMAT, "sae": sae.name, **source, **of_dataset, "features": listed})
    return place.path


def feature_json(activity: Activity, effects: Float[np.ndarray, " n_vocab"]) -> dict[str, Any]:
    """One feature of a batch, without the fields of the dataset. ``effects``: on the logit of every token."""
    try:
        json.dumps([dataclasses.asdict(activity), effects.tolist()], allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"feature {activity.feature} has a number that is not finite: check the model's parameters and gather again"
        ) from error
    groups = [(-1.0, -1.0, activity.top)]
    groups += [(group.low, float(f"{group.share * activity.density:.4g}"), group) for group in activity.lower]
    heights, logits = np.histogram(effects, LOGIT_BARS)
    return {
        "feature_index": activity.feature,
        **{name: [] for name in EMPTY},
        **_tokens("neg", activity.lowered),
        **_tokens("pos", activity.raised),
        "frac_nonzero": activity.density,
        "freq_hist_data_bar_values": _centres(np.asarray(activity.histogram.edges)),
        "freq_hist_data_bar_heights": activity.histogram.counts,
        "logits_hist_data_bar_values": _centres(logits),
        "logits_hist_data_bar_heights": heights.tolist(),
        "activations": [one for least, share, group in groups for one in _activations(group, least, share)],
    }


def _activations(group: ContextGroup, least: float, share: float) -> list[dict[str, Any]]:
    bins = {"bin_min": least, "bin_max": group.high, "bin_contains": share}
    return [
        {**bins, "tokens": one.tokens, "values": one.values, "qualifying_token_index": one.focus}
        for one in group.contexts
    ]


def _tokens(side: str, effects: list[TokenEffect]) -> dict[str, list]:
    """The tokens of one side. A label shows a space as a symbol; Neuronpedia puts in its own."""
    texts = [one.token.replace("␣", " ") for one in effects]
    return {f"{side}_str": texts, f"{side}_values": [one.effect for one in effects]}


def _centres(edges: np.ndarray) -> list[float]:
    return significant((edges[1:] + edges[:-1]) / 2).tolist() if edges.size else []


@jax.jit
def _effects(lm: LanguageModel, sae: SAE, feature):
    with jax.default_matmul_precision("highest"):
        return direct_effects(lm, sae, feature)


def _check_features(sae: SAE, activities: Sequence[Activity]) -> None:
    if not activities:
        raise ValueError("there is no feature to export: give the activities of at least one feature")
    numbers = [sae.check_feature(activity.feature) for activity in activities]
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ValueError(f"feature {twice} of SAE {sae.name} is given twice: give it once")


def _write(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
