"""EVA against singular value decompositions of all inputs, and against peft's incremental one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import TINY, make_recipe, tiny_model
from peft.utils.incremental_pca import IncrementalPCA

from qhybrid.architecture.bands import build_layout
from qhybrid.architecture.schedules import Place
from qhybrid.architecture.spec import spec_from_config
from qhybrid.data.tokenize import EncodedRow
from qhybrid.ranks import eva

LAYOUT = build_layout(make_recipe(adapters={"ranks": "eva", "rank": 4}), spec_from_config(TINY))


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(4)
    return [EncodedRow(ids := generator.integers(3, 128, n), ids) for n in (30, 11, 25, 40, 18)]


def inputs_of(model, rows, module):
    seen = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, x, y: seen.append(x[0][0].double()))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor(row.input_ids)[None])
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("memory", [1, 2**30])
def test_directions_are_the_right_singular_vectors_of_the_centred_inputs(rows, memory):
    model = tiny_model()
    largest = dict.fromkeys((row.module for row in LAYOUT), 6)
    found = eva.input_directions(model, rows, LAYOUT.rows, largest, batch_size=2, memory=memory)
    for name in ("0.self_attn.v_proj", "5.mlp.down_proj", "3.mlp.up_proj"):
        module = f"model.layers.{name}"
        x = inputs_of(model, rows, module)
        _, sigma, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        shares = sigma.square() / sigma.square().sum()
        assert torch.allclose(found[module].shares, shares[:6], rtol=1e-4)
        cosines = (found[module].vectors.double() * v[:6]).sum(1).abs()
        apart = (sigma[:6] - sigma[1:7]) / sigma[:6]  # nearly equal values have no directions of their own
        assert bool((cosines[apart > 0.01] > 0.999).all())
        stock = IncrementalPCA(n_components=6).fit(x.float())
        assert torch.allclose(found[module].shares.float(), stock.explained_variance_ratio_[:6].float(), rtol=2e-2)
    q, k = (found[f"model.layers.2.self_attn.{name}_proj"] for name in "qk")
    assert torch.equal(q.vectors, k.vectors)


def test_directions_are_taken_by_share_within_the_budget():
    def with_shares(*shares):
        return eva.Directions(torch.zeros(len(shares), 1), torch.tensor(shares, dtype=torch.float64))

    shares = (0.5, 0.2, 0.1, 0.05), (0.9, 0.01, 0.005, 0.001), (0.4, 0.3, 0.25)
    directions = [with_shares(*each) for each in shares]
    places = [Place(0, "a", 10, 1, 4), Place(0, "b", 10, 1, 4), Place(0, "c", 10, 1, 3)]
    # one each, then 0.3, 0.25, 0.2, 0.1
    assert eva.ranks_of_directions(directions, places, 30) == [1, 1, 1]
    assert eva.ranks_of_directions(directions, places, 59) == [1, 1, 3]
    assert eva.ranks_of_directions(directions, places, 70) == [3, 1, 3]
