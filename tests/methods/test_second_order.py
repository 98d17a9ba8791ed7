import pytest
import torch

from methods import LayerContext, LayerStatistics, method_class
from methods.registry import method_names
from methods.second_order import CompensationConfig, DampingConfig, aligned_block_size, logged_factor


@pytest.mark.parametrize(
    ("block_size", "group_size", "expected"),
    [(128, 128, 128), (128, 32, 128), (128, 576, 576), (128, 256, 128), (128, 96, 96), (1, 64, 1)],
)
def test_groups_do_not_straddle_blocks(block_size, group_size, expected):
    assert aligned_block_size(block_size, group_size) == expected


def test_the_factor_is_logged_with_dead_inputs_and_raised_damping():
    hessian = torch.eye(8)
    hessian[3, 3] = 0
    context = LayerContext()
    assert logged_factor(LayerStatistics.from_hessian(hessian), 0.01, context).damping == 0.01
    assert context.facts == {"dead_columns": 1}
    hessian[0, 1] = hessian[1, 0] = 1.05
    logged_factor(LayerStatistics.from_hessian(hessian), 0.01, context)
    assert context.facts["damping"] == pytest.approx(0.1)


@pytest.mark.parametrize("name", method_names())
def test_damping_and_block_size_mean_the_same_in_every_method(name):
    config = method_class(name).Config
    if "damping" in config.model_fields and name != "sage-ptq":  # there for one of its settings alone
        assert issubclass(config, DampingConfig)
        assert config.model_fields["damping"].default == 0.01
    if "block_size" in config.model_fields and name != "billm":  # there it is the size of what is quantized at once
        assert issubclass(config, CompensationConfig)
