from concurrent.futures import ThreadPoolExecutor

from ddim_fast.io.progress import Bar, collect, tell, watch


def test_who_watches_is_told_and_nobody_else():
    told = []
    tell(1.0)
    with watch(lambda *what: told.append(what)):
        tell(0.5)
        with collect() as kept:
            tell(0.25, evaluations=2)
        with ThreadPoolExecutor(1) as other:
            other.submit(tell, 8.0).result()
        tell(0)
    tell(1.0)
    assert told == [(0.5, 1), (0, 1)] and kept == [(0.25, 2)]


def test_a_bar_moves_with_each_network_call_and_ends_where_its_images_do(capsys):
    with Bar(4, there=1, runs=2) as bar:
        for _ in range(4):
            tell(0.5)
        bar.made(3)
        tell(7.0)
    printed = capsys.readouterr().err
    assert "| 1/4 images" in printed and "4/4 images" in printed and "5 network calls" in printed


def test_a_bar_that_is_not_shown_leaves_the_watch_to_others(capsys):
    told = []
    with watch(lambda *what: told.append(what)), Bar(4, shown=False):
        tell(1.0)
    assert told == [(1.0, 1)] and capsys.readouterr().err == ""
