import threading
import time

from drorae.training.newest import Newest


def test_a_slow_call_holds_nobody_up_and_the_last_arguments_arrive() -> None:
    seen: list[int] = []
    entered, go_on = threading.Event(), threading.Event()

    def slow(number: int) -> None:
        seen.append(number)
        entered.set()
        assert go_on.wait(30)

    newest = Newest(slow)
    newest(0)
    assert entered.wait(30)
    start_s = time.perf_counter()
    for number in range(1, 1000):
        newest(number)
    assert time.perf_counter() - start_s < 5
    go_on.set()
    newest.close()
    assert seen == [0, 999]


def test_an_error_in_the_background_ends_nothing(caplog) -> None:
    seen: list[int] = []

    def fails_once(number: int) -> None:
        seen.append(number)
        raise RuntimeError("the store is away")

    newest = Newest(fails_once)
    newest(1)
    newest.close()
    assert seen == [1]
    assert "the store is away" in caplog.text


def test_closing_without_a_call_returns() -> None:
    Newest(print).close()
