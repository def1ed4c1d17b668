import pytest

from drorae.models.dit_config import DiTConfig
from drorae.models.reference_config import read_decoder_fields, read_dit_config


def test_absent_fields_have_the_defaults_of_the_reference_constructors():
    assert read_dit_config({}) == DiTConfig(input_size=1)
    plain = read_dit_config({"hidden_size": 1152})
    assert (plain.input_size, plain.depths, plain.heads) == (16, (28,), (16,))


def test_whole_floats_are_sizes_and_options_of_the_plain_model_change_nothing():
    fields = {"hidden_size": [24.0, 32], "num_heads": 2.0, "patch_size": [1.0, 1.0]}
    config = read_dit_config(fields)
    assert (config.widths, config.heads, config.patches) == ((24, 32), (2, 2), (1, 1))
    plain = {"hidden_size": 24, "num_heads": 2, "depth": 1}
    assert read_dit_config({**plain, "learn_sigma": True}) == read_dit_config(plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 24, "num_heads": 2, "use_gembed": False}, "use_gembed=False"),
        ({"learn_sigma": False}, "learn_sigma is no field"),
        ({"hidden_size": [24, 32.5]}, "wrong type"),
        ({"depht": [1, 1]}, "depht is no field. Close matches: depth"),
        ([], "expected constructor fields"),
    ],
)
def test_what_the_constructors_do_not_know_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        read_dit_config(fields)


def test_decoder_fields_are_found_under_every_name_and_one_level_down():
    fields = {"encoder_mean": [0.5, 0.5, 0.5], "decoder": {"num_patches": 9, "latent_dim": 6.0}}
    found = read_decoder_fields(fields)
    assert found == {"image_mean": [0.5, 0.5, 0.5], "grid": 3, "latent_channels": 6}
    assert read_decoder_fields({"width": 8, "decoder_hidden_size": 8}) == {"width": 8}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"width": 8, "decoder_hidden_size": 16}, "disagree"),
        ({"grid": 4, "decoder": {"grid": 4}}, "'grid' stands twice"),
        ({"decoder": {"mask_token": 1}}, "unknown key 'mask_token'"),
        ({"num_channels": 4}, "expected 3"),
    ],
)
def test_decoder_fields_that_mislead_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        read_decoder_fields(content)
