import pytest

from harness.catalog import models, shapes
from harness.runtime.architecture import catalogued
from harness.runtime.synthetic_ledger import small_parameters
from kernels.errors import InputError


@pytest.mark.parametrize("name", models())
def test_shapes_have_the_weights_of_the_catalogued_model(name):
    assert catalogued(name).linear_weights == models()[name].linear_parameters


@pytest.mark.parametrize("name", sorted(shapes()))
def test_shapes_have_the_parameters_of_the_catalogued_model(name):
    a = catalogued(name)
    embeddings = a.vocabulary * a.hidden * (1 if a.tied else 2) + (2050 * a.hidden if a.block == "opt" else 0)
    assert a.linear_weights + embeddings + small_parameters(a) == models()[name].parameters


def test_an_unknown_shape_is_refused():
    with pytest.raises(InputError, match="no shapes of model 'lama-2-7b'; did you mean 'llama-2-7b'"):
        catalogued("lama-2-7b")
