"""Component 2: how many groups (SAGE-PTQ section 3.1.2, equation 3, algorithm 1).

A sample of the unsalient weights becomes a sparse k-nearest-neighbour graph; the graph is clustered spectrally into r
parts for every r that an N_LUT-bit index can name, and the r with the best silhouette is the number of groups. The
clusters themselves are discarded. The spectral embedding is computed once: the embedding for r clusters is the first
r of its columns.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import k_means
from sklearn.manifold import spectral_embedding
from sklearn.metrics import silhouette_score
from sklearn.neighbors import kneighbors_graph

from kernels.errors import InputError


@dataclass(frozen=True)
class GroupChoice:
    """The chosen number of groups, the silhouette of each candidate, and the nodes the graph really had."""

    groups: int
    silhouettes: dict[int, float]
    nodes: int


def candidate_counts(n_lut: int) -> range:
    """Group counts whose index needs exactly `n_lut` bits: 2^(n_lut - 1) + 1 .. 2^n_lut - 1; 9 .. 15 for 4."""
    return range((1 << (n_lut - 1)) + 1, 1 << n_lut)


def choose_group_count(
    unsalient: np.ndarray,
    *,
    n_lut: int,
    neighbors: int,
    subsample: float,
    max_nodes: int,
    node: str,
    silhouette_on: str,
    seed: int,
) -> GroupChoice:
    """The number of groups for the unsalient weights of one matrix.

    unsalient: [count], their values. subsample: fraction of them that becomes nodes, at least four times the largest
    candidate and at most `max_nodes`. node: "value" or "magnitude". silhouette_on: "values" or "embedding".
    """
    candidates = candidate_counts(n_lut)
    wanted = max(round(subsample * unsalient.size), 4 * candidates[-1])
    count = min(wanted, max_nodes, unsalient.size)
    if count <= candidates[-1]:
        raise InputError(
            f"{unsalient.size} unsalient weights are too few to choose among {candidates[0]}..{candidates[-1]} groups; "
            "set group_count, or lower n_lut"
        )
    sample = np.random.default_rng(seed).choice(unsalient, size=count, replace=False)
    values = (np.abs(sample) if node == "magnitude" else sample).astype(np.float64).reshape(-1, 1)
    embedding = _embed(values, candidates[-1], neighbors, seed)
    silhouettes = {}
    for clusters in candidates:
        coordinates = embedding[:, :clusters]
        _, labels, _ = k_means(coordinates, clusters, n_init=10, random_state=seed)
        found = np.unique(labels).size
        # Duplicate weights may leave fewer distinct clusters than asked for; one cluster has no silhouette.
        silhouettes[clusters] = (
            float(silhouette_score(values if silhouette_on == "values" else coordinates, labels)) if found > 1 else -1.0
        )
    best = max(candidates, key=lambda clusters: silhouettes[clusters])
    return GroupChoice(best, silhouettes, count)


def _embed(values: np.ndarray, components: int, neighbors: int, seed: int) -> np.ndarray:
    """Eigenvectors of the normalized Laplacian of the k-nearest-neighbour graph: [nodes, components]."""
    graph = kneighbors_graph(values, min(neighbors, values.shape[0] - 1), include_self=True)
    with warnings.catch_warnings():
        # Weights in the tails are far from the rest: such a graph falls into components, and the embedding then
        # separates them, which is what clustering is for.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        # A graph with nearly all edges has one eigenvalue many times over, where ARPACK may give up, on some machines;
        # scikit-learn then takes another solver.
        warnings.filterwarnings("ignore", message="ARPACK has failed")
        return spectral_embedding(0.5 * (graph + graph.T), n_components=components, drop_first=False, random_state=seed)
