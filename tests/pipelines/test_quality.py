from pipelines.quality import quality_tables


def test_rows_follow_the_models_and_differences_carry_a_sign() -> None:
    metrics = {
        "reconstruction/rae/psnr": 17.234,
        "reconstruction/fusion/psnr": 21.7,
        "difference/fusion-rae/psnr": 4.466,
        "generation/cfg/fd": 12.34,
        "generation/cfg/kid": None,
        "speed/images_per_s": 5.0,
    }
    (_, columns, rows), (title, _, generated) = quality_tables(metrics)
    assert columns[1] == "PSNR dB"
    assert [row[:2] for row in rows] == [
        ("rae", "17.23"),
        ("fusion", "21.70"),
        ("fusion-rae", "+4.47"),
    ]
    assert (title, generated[0][:3]) == ("generated images", ("cfg", "12.3", ""))


def test_no_numbers_make_no_table() -> None:
    assert quality_tables({"reconstruction/unknown/psnr": 1.0}) == []
