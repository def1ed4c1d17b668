import pytest

from drorae.config import from_json, to_json
from drorae.models.dit_config import DiTConfig, dit_preset


def test_json_round_trip():
    for config in (dit_preset("DiT-DH-S"), dit_preset("DiT-B"), DiTConfig(patch_size=(2, 1))):
        assert from_json(DiTConfig, to_json(config)) == config


def test_lists_of_a_released_configuration_become_tuples():
    config = from_json(DiTConfig, {"hidden_size": [64, 128], "depth": [2, 2], "num_heads": [4, 4]})
    assert config == DiTConfig(hidden_size=(64, 128), depth=(2, 2), num_heads=(4, 4))
    assert hash(config)


def test_one_number_serves_both_parts():
    config = DiTConfig(hidden_size=(64, 128), depth=(2, 2), num_heads=4, patch_size=2)
    assert config.heads == (4, 4)
    assert config.patches == (2, 2)
    assert config.has_head


def test_one_width_is_the_plain_model():
    config = dit_preset("DiT-B", in_channels=8, input_size=4, num_classes=3)
    assert not config.has_head
    assert (config.widths, config.depths, config.heads) == ((768,), (12,), (12,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wo_shift": True}, "wo_shift"),
        ({"hidden_size": (64, 128, 256)}, "do not fit"),
        ({"depth": 4}, "do not fit"),
        ({"num_heads": (16,)}, "num_heads"),
        ({"patch_size": (1, 1, 1)}, "patch_size"),
        ({"in_channels": 0}, "below 1"),
        ({"num_heads": (0, 16)}, "below 1"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"base_head_after": 29}, "1..28"),
        ({"patch_size": (1, 2)}, "multiple of the"),
        ({"input_size": 15, "patch_size": 2}, "does not divide into patches"),
        ({"num_heads": (7, 16)}, "does not divide over 7 heads"),
        ({"hidden_size": (96, 2048)}, "multiple of 4, because rotary"),
        ({"hidden_size": (1154, 2048), "num_heads": 2, "use_rope": False}, "sin-cos"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**changes)
