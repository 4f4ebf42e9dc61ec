"""How answers are scored."""

from itertools import combinations

import pytest

from penstock.lightning_modules.answers import Scored, accuracies, exact, option, plain, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The cat", "cat"),
        ("Two  cats", "2 cats"),
        ("none", "0"),
        ("ten", "10"),
        ("x-ray", "x ray"),
        ("red - white", "red white"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("isnt", "isn't"),
        ("couldn'tve", "couldn't've"),
        ("yall", "y'all"),
        ("somebody'd", "somebodyd"),
        ("Bob's", "bob 's"),
        ("10:30?\n", "10:30"),
        ("$5 (five)", "$5 5"),
    ],
)
def test_answers_are_compared_as_vqa_does(answer, expected):
    assert plain(answer) == expected


@pytest.mark.parametrize(("same", "worth"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_the_mean_over_nine_of_ten_people(same, worth):
    people = ["a Cat"] * same + [f"dog {k}" for k in range(10 - same)]
    assert vqa_accuracy("cat.", people) == pytest.approx(worth)
    chosen = list(combinations(people, 9))
    assert worth == pytest.approx(sum(min(sum(p == "a Cat" for p in nine) / 3, 1) for nine in chosen) / 10)


def test_exact():
    assert exact(" A  seven.", ["a Seven"]) == 1
    assert exact("seven", ["a seven", "SEVEN"]) == 1
    assert exact("seven", ["a seven"]) == exact("", ["one"]) == 0


@pytest.mark.parametrize("answer", ["B", " b.".upper(), "B. a cat", "(B)", "B)", "B, it is"])
def test_options(answer):
    assert option(answer, ["B"]) == 1
    assert option(answer, ["A"]) == 0


@pytest.mark.parametrize("answer", ["A cat", "b", "Because", ""])
def test_what_is_no_option(answer):
    assert option(answer, ["A"]) == option(answer, ["B"]) == 0


def test_a_question_is_worth_its_worst_way():
    scored = [Scored(0, 7, 1), Scored(1, 7, 0), Scored(2, 8, 1), Scored(3, 8, 1), Scored(4, 9, 0), Scored(5, 9, 1)]
    assert accuracies(scored[::-1]) == {"accuracy": pytest.approx(1 / 3), "accuracy_once": pytest.approx(2 / 3)}
    assert accuracies(scored + scored[:1]) == accuracies(scored)
    assert accuracies([Scored(0, 0, 0.3), Scored(1, 1, 1)]) == {"accuracy": pytest.approx(0.65)}
