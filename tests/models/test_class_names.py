import pytest

from ddim_fast import UNetConfig


def named(*names: str) -> UNetConfig:
    return UNetConfig(sample_size=32, num_classes=len(names), class_names=names)


PETS = named("Cat", "dog", "horse/pony", "cat, wild", "2/ann", "2/bob")


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("dog", [1]),
        ("DOG", [1]),
        (" dog ", [1]),
        ("cat", [0]),  # a whole name before a part of another
        ("pony", [2]),
        ("wild", [3]),
        ("2/bob", [5]),
        ("2", [4, 5]),  # a name before a number
        ("3", [3]),
    ],
)
def test_a_class_by_name_or_number(text, numbers):
    assert PETS.class_numbers(text) == numbers


def test_capitals_tell_names_apart_that_are_the_same_without():
    config = named("cat", "Cat")
    assert [config.class_numbers(text) for text in ("cat", "Cat", "CAT")] == [[0], [1], [0, 1]]


def test_names_that_are_numbers_are_names():
    config = named("1", "2", "3")
    assert [config.class_numbers(text) for text in ("1", "3", "0")] == [[0], [2], [0]]


@pytest.mark.parametrize(
    "config, text, message",
    [
        (
            PETS,
            "hores",
            "no class is called 'hores'; did you mean 'horse'? There are Cat, dog, horse/pony, cat, wild, 2/",
        ),
        (PETS, "x", "no class is called 'x'; there are Cat, "),
        (PETS, "", "no class is called ''; there are Cat, "),
        (PETS, "6", "class 6 is out of range: the network has classes 0..5"),
        (PETS, "9" * 10_000, "is out of range"),
        (PETS, "-1", "no class is called '-1'"),
        (PETS, "\u0661", "no class is called"),
        (named("ankle boot"), "boot", "did you mean 'ankle boot'?"),
        (named(*(f"n{i}" for i in range(14))), "x", "there are n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10, n11 and 2 more"),
        (UNetConfig(sample_size=32, num_classes=3), "cat", "no class is called 'cat'; there are classes 0..2, without names"),
        (UNetConfig(sample_size=32), "cat", "the network is unconditional: it has no classes"),
    ],
)
def test_what_is_no_class_is_told_what_there_is(config, text, message):
    with pytest.raises(ValueError, match="class") as error:
        config.class_numbers(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_where_one_class_is_needed():
    assert PETS.class_number("2/ann") == 4 and PETS.class_number("1") == 1
    with pytest.raises(ValueError, match="'2' means 2 classes; name one of 2/ann, 2/bob"):
        PETS.class_number("2")


def test_packaged_models_name_their_classes():
    from ddim_fast.models.checkpoint import load_config, local_model

    numbers = {
        model: load_config(local_model(model)).class_number(name)
        for model, name in (("cifar10-64", "horse"), ("fashion-mnist", "top"), ("spoken-digits", "7/jackson"))
    }
    assert numbers == {"cifar10-64": 7, "fashion-mnist": 0, "spoken-digits": 43}
