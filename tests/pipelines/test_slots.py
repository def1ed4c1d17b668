import threading
import time

from pipelines.slots import Slots


def test_no_more_than_the_limit_run_at_once() -> None:
    slots, running, most, lock = Slots(2), [0], [0], threading.Lock()

    def work() -> None:
        with slots.take(1):
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.02)
            with lock:
                running[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 2


def test_the_longest_chain_is_served_first() -> None:
    slots, order, held = Slots(1), [], threading.Event()

    def work(length: int) -> None:
        with slots.take(length):
            order.append(length)

    with slots.take(9):
        threads = [threading.Thread(target=work, args=(n,)) for n in (1, 3, 2)]
        for thread in threads:
            thread.start()
        held.wait(0.1)
    for thread in threads:
        thread.join()
    assert order == [3, 2, 1]


def test_of_two_equal_chains_the_earlier_in_the_table_goes_first() -> None:
    slots, order = Slots(1), []

    def work(position: int) -> None:
        with slots.take(2, position):
            order.append(position)

    threads = [threading.Thread(target=work, args=(position,)) for position in (7, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == [6, 7]
