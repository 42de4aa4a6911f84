from itertools import combinations, product

from tests.helpers.pairs import every_pair


def test_every_pair_of_values_meets_and_names_are_the_cases():
    options = {"a": {"one": 1, "two": 2}, "b": [None, 3.5, "x"], "c": [True, False], "d": list(range(5))}
    names, cases = every_pair(**options).args
    assert names == "a,b,c,d"
    rows = [case.values for case in cases]
    values = [list(v.values()) if isinstance(v, dict) else v for v in options.values()]
    for i, j in combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(values[i], values[j]))
    assert len(rows) < 25 and next(case.id for case in cases if case.values[0] == 2).startswith("two-")
