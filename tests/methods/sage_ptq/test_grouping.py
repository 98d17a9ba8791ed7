"""The number of groups from the graph."""

import warnings

import numpy as np
import pytest
from sklearn.cluster import SpectralClustering
from sklearn.metrics import silhouette_score

from kernels.errors import InputError
from methods.sage_ptq.grouping import candidate_counts, choose_group_count

OPTIONS = {
    "n_lut": 4,
    "neighbors": 5,
    "subsample": 0.0003,
    "max_nodes": 2000,
    "node": "value",
    "silhouette_on": "values",
    "seed": 0,
}


def choose(values, **options):
    return choose_group_count(values, **{**OPTIONS, **options})


def mixture(clusters, size=400, seed=0):
    """`clusters` heaps of values, far apart."""
    generator = np.random.default_rng(seed)
    centers = np.linspace(-1, 1, clusters)
    return (np.repeat(centers, size) + 0.002 * generator.standard_normal(clusters * size)).astype(np.float32)


@pytest.mark.parametrize(
    ("n_lut", "counts"), [(2, [3]), (3, [5, 6, 7]), (4, list(range(9, 16))), (6, list(range(33, 64)))]
)
def test_candidates_are_the_counts_that_need_all_bits_of_the_index(n_lut, counts):
    assert list(candidate_counts(n_lut)) == counts
    for count in counts:
        assert int(np.ceil(np.log2(count + 1))) == n_lut


@pytest.mark.parametrize(("n_lut", "clusters"), [(3, 5), (3, 6), (3, 7), (4, 9), (4, 11), (4, 14)])
def test_well_separated_heaps_are_counted(n_lut, clusters):
    # With 5 neighbours on a line the graph of a heap of 20 nodes falls apart, with 10 it holds.
    choice = choose(mixture(clusters), n_lut=n_lut, subsample=0.05, neighbors=10)
    assert choice.groups == clusters
    assert choice.silhouettes[clusters] > 0.9


@pytest.mark.parametrize("silhouette_on", ["values", "embedding"])
def test_the_choice_has_the_best_silhouette_of_all_candidates(silhouette_on):
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    choice = choose(values, silhouette_on=silhouette_on)
    assert set(choice.silhouettes) == set(range(9, 16))
    assert choice.silhouettes[choice.groups] == max(choice.silhouettes.values())
    assert all(-1 <= silhouette <= 1 for silhouette in choice.silhouettes.values())


def test_the_same_seed_gives_the_same_choice_and_another_seed_another_sample():
    values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    assert choose(values) == choose(values)
    assert choose(values).silhouettes != choose(values, seed=1).silhouettes


def test_the_argument_is_not_changed():
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    before = values.copy()
    choose(values, node="magnitude")
    assert np.array_equal(values, before)


@pytest.mark.parametrize(
    ("count", "options", "nodes"),
    [
        (1_000_000, {}, 300),  # 0.03 % of the weights
        (20_000, {}, 60),  # never fewer than four times the largest candidate
        (20_000, {"subsample": 0.5, "max_nodes": 150}, 150),
        (50, {}, 50),  # never more than there are
    ],
)
def test_nodes_are_the_sampled_share_within_limits(count, options, nodes):
    values = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    assert choose(values, **options).nodes == nodes


def test_a_node_may_be_a_magnitude():
    # Five heaps of magnitudes are ten heaps of values, of which seven at most can be counted.
    values = mixture(10)
    options = {"n_lut": 3, "subsample": 0.05, "neighbors": 10}
    assert choose(values, node="magnitude", **options).groups == 5
    assert choose(values, node="value", **options).groups == 7


def test_one_embedding_for_all_candidates_gives_what_scikit_learn_gives_for_each():
    values = np.random.default_rng(3).standard_normal(5000).astype(np.float32)
    choice = choose(values, n_lut=3, subsample=0.05, neighbors=30)  # enough neighbours for one connected graph
    sample = np.random.default_rng(0).choice(values, size=choice.nodes, replace=False).astype(np.float64)
    for clusters, silhouette in choice.silhouettes.items():
        clustering = SpectralClustering(
            clusters, affinity="nearest_neighbors", n_neighbors=30, n_init=10, random_state=0
        )
        labels = clustering.fit_predict(sample.reshape(-1, 1))
        assert silhouette == pytest.approx(silhouette_score(sample.reshape(-1, 1), labels), abs=0.005)


@pytest.mark.parametrize("count", [0, 1, 8, 15])
def test_too_few_weights_are_refused_with_a_way_out(count):
    with pytest.raises(InputError, match=f"{count} unsalient weights are too few .* 9..15 groups; set group_count"):
        choose(np.linspace(-1, 1, count, dtype=np.float32))


def test_equal_weights_give_some_count_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (np.zeros(500, dtype=np.float32), np.repeat(np.float32([-1, 1]), 250)):
            assert choose(values).groups in range(9, 16)


def test_a_solver_that_gives_up_is_replaced_without_a_word(monkeypatch):
    from scipy.sparse.linalg import ArpackError
    from sklearn.manifold import _spectral_embedding

    def give_up(*args, **kwargs):
        raise ArpackError(3)

    expected = choose(mixture(6), n_lut=3, neighbors=1000).groups
    monkeypatch.setattr(_spectral_embedding, "eigsh", give_up)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(mixture(6), n_lut=3, neighbors=1000).groups == expected
