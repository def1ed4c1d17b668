import pytest
import torch

from drorae.models.rotary import RotaryPositions, rotary_angles


def test_table_has_the_values_of_the_reference():
    sine = RotaryPositions(72, 16).freqs_sin
    assert sine.shape == (256, 72)
    assert sine[1, 0] == 0
    assert sine[1, [36, 38]].tolist() == pytest.approx([0.84147, 0.56422], abs=1e-5)
    assert sine[16, [0, 1, 2, 36]].tolist() == pytest.approx(
        [0.84147, 0.84147, 0.56422, 0], abs=1e-5
    )


def test_rotation_keeps_lengths_and_depends_on_offsets_only():
    rotary = RotaryPositions(8, 3).double()
    angles = rotary_angles(8, 3)
    rotary.freqs_cos.copy_(angles.cos())
    rotary.freqs_sin.copy_(angles.sin())
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 9, 8)
    turned_q, turned_k = rotary(query)[0, 0], rotary(key)[0, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), query[0, 0].norm(dim=-1))
    # (1,1)-(0,0), (2,2)-(1,1) and (1,1) seen from (0,0) one row lower are the same offset
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[4, 0], scores[8, 4])
    torch.testing.assert_close(scores[3, 1], scores[7, 5])
    assert not torch.isclose(scores[1, 0], scores[3, 0])


def test_head_width_must_hold_pairs_of_rows_and_columns():
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_angles(6, 4)
