import math

import pytest
import torch

from drorae.models.layers import attend, grid_side, normalise_features, sincos_position_table


def test_positions_have_the_reference_s_golden_values():
    table = sincos_position_table(1152, 16)
    assert table.shape == (256, 1152)
    assert table.dtype == torch.float32
    column, row = table[1], table[16]
    found = [column[i].item() for i in (0, 288, 576, 864, 1)]
    assert found == pytest.approx([0.84147, 0.54030, 0.0, 1.0, 0.824051], abs=1e-5)
    found = [row[i].item() for i in (0, 288, 576, 864)]
    assert found == pytest.approx([0.0, 1.0, 0.84147, 0.54030], abs=1e-5)


@pytest.mark.parametrize(("dim", "grid"), [(6, 4), (0, 4), (8, 0)])
def test_impossible_tables_are_refused(dim, grid):
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_position_table(dim, grid)


def test_normalised_features_have_no_mean_and_variance_one():
    x = torch.randn(3, 5, 16, dtype=torch.float64) * 7 + 3
    y = normalise_features(x, 1e-6)
    assert y.mean(-1).abs().max() < 1e-12
    assert (y.var(-1, correction=0) - 1).abs().max() < 1e-6


def test_attention_equals_its_definition():
    q, k, v = torch.randn(3, 2, 5, 8, dtype=torch.float64).unbind(0)
    out = []
    for head in range(2):
        part = slice(head * 4, head * 4 + 4)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)
        out.append(scores.softmax(-1) @ v[..., part])
    torch.testing.assert_close(attend(q, k, v, 2), torch.cat(out, -1))


def test_only_square_numbers_have_a_side():
    assert grid_side(256) == 16
    with pytest.raises(ValueError, match="no square"):
        grid_side(255)
