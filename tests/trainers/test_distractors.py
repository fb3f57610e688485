"""Every question gets k documents, and only its own hold the answer."""

import json
from collections import Counter

import pytest

from softrag_trainers.distractors import (
    add_distractors,
    cap_sources,
    drop_repeated_questions,
    holds_answer,
    main,
)
from softrag_trainers.examples import QuestionRow, load_questions, save_questions

CITIES = ["Paris", "Rome", "Oslo", "Bern", "Cairo", "Lima", "Quito", "Seoul"]
PEOPLE = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal"]


def question(number: int, **changes: object) -> QuestionRow:
    city, person = CITIES[number], PEOPLE[number]
    fields = {
        "id": f"q{number}",
        "question": f"Who built the bridge of {city}?",
        "answers": (person,),
        "documents": (f"The bridge of {city} was built by {person}.",),
        "gold": (True,),
        "source": "bridges",
    }
    return QuestionRow(**fields | changes)


@pytest.fixture
def bridges() -> list[QuestionRow]:
    return [question(number) for number in range(len(CITIES))]


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_every_row_has_exactly_k_different_documents(bridges, k):
    for before, after in zip(bridges, add_distractors(bridges, k), strict=True):
        assert len(set(after.documents)) == len(after.documents) == len(after.gold) == k
        assert [doc for doc, gold in zip(after.documents, after.gold, strict=True) if gold] == [
            *before.documents
        ]
        assert (after.id, after.question, after.answers) == (
            before.id,
            before.question,
            before.answers,
        )


def test_a_distractor_never_holds_an_answer(bridges):
    spoilers = [
        question(number, answers=("Ada",), documents=(f"Paris has a bridge by ADA, {number}.",))
        for number in range(4)
    ]
    row = add_distractors([*bridges, *spoilers], 5)[0]

    assert sum(holds_answer(document, ["Ada"]) for document in row.documents) == 1


def test_lexical_neighbours_come_before_the_rest():
    far = [
        question(number, question="When?", documents=(f"Nothing of it {number}.",))
        for number in range(3, 8)
    ]
    near = [question(1, documents=("A bridge.",)), question(2, documents=("Paris, a bridge.",))]

    row = add_distractors([question(0), *far, *near], 3, random_share=0.0)[0]

    assert set(row.documents) == {
        "The bridge of Paris was built by Ada.",
        "Paris, a bridge.",
        "A bridge.",
    }


def test_a_rows_own_documents_come_first_and_gold_ones_are_kept(bridges):
    own = ("Own, no answer.", "Ada, gold.", "Own, too.", "Ada again, gold.")
    rows = [question(0, documents=own, gold=(False, True, False, True)), *bridges[1:]]

    kept = {k: set(add_distractors(rows, k)[0].documents) for k in (1, 2, 3, 4)}

    assert kept[1] == {"Ada, gold."}
    assert kept[2] == {"Ada, gold.", "Ada again, gold."}
    assert kept[3] == {"Ada, gold.", "Ada again, gold.", "Own, no answer."}
    assert kept[4] == set(own)


def test_a_document_given_twice_counts_once_and_stays_gold(bridges):
    rows = [question(0, documents=("Ada.", "Ada."), gold=(True, False)), *bridges[1:]]

    row = add_distractors(rows, 2)[0]

    assert dict(zip(row.documents, row.gold, strict=True))["Ada."] is True
    assert row.documents.count("Ada.") == 1


def test_distractors_come_from_the_rows_source_while_it_has_any(bridges):
    towers = [
        question(number, source="towers", documents=(f"A tower of {CITIES[number]}.",))
        for number in range(8)
    ]
    for row in add_distractors([*bridges, *towers], 5)[:8]:
        assert all("bridge" in document for document in row.documents)


def test_a_source_too_small_borrows_from_the_others(bridges):
    lonely = question(0, source="towers", documents=("A tower.",))

    row = add_distractors([*bridges, lonely], 3)[-1]

    assert len(row.documents) == 3
    assert Counter("bridge" in document for document in row.documents)[True] == 2


def test_the_order_is_shuffled_and_decided_by_the_seed(bridges):
    first, again = (add_distractors(bridges, 5, seed=1) for _ in range(2))

    assert first == again
    assert first != add_distractors(bridges, 5, seed=2)
    assert len({row.gold.index(True) for row in first}) > 1


def test_stop_words_and_signs_are_no_reason_to_fail():
    rows = [
        question(0, question="is it?", documents=("!!!",)),
        question(1, question="??", documents=("the",)),
    ]
    assert [set(row.documents) for row in add_distractors(rows, 2)] == [{"!!!", "the"}] * 2


def test_too_few_passages_is_an_error_that_names_the_row(bridges):
    with pytest.raises(ValueError, match="Question 'q0' has 8 documents and needs 9"):
        add_distractors(bridges, 9)
    with pytest.raises(ValueError, match="k is 0"):
        add_distractors(bridges, 0)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("Built by the Romans.", "romans", True),
        ("Built by Romans.", "The Romans!", True),
        ("A Romanesque church", "Roman", False),
        ("Fifty-one boats", "fifty one", True),
        ("No boats, yes.", "yes", False),
        ("Anything", "?!", False),
        ("Im Élysée", "élysée", True),
    ],
)
def test_an_answer_is_found_as_whole_words(text, answer, expected):
    assert holds_answer(text, [answer]) is expected


def test_repeated_questions_keep_their_first_row(bridges):
    repeated = question(1, question=" who built the bridge of PARIS? ")

    assert drop_repeated_questions([*bridges, repeated]) == bridges


def test_caps_keep_the_first_rows_of_a_source(bridges):
    other = question(0, source="towers")

    assert cap_sources([*bridges, other], {"bridges": 2}) == [*bridges[:2], other]
    with pytest.raises(ValueError, match=r"the source 'boats', but the rows have \['bridges'\]"):
        cap_sources(bridges, {"boats": 2})


def test_the_command_writes_a_mixture_that_loads(bridges, tmp_path):
    save_questions(tmp_path / "bridges.jsonl", [*bridges, bridges[0]])
    out = tmp_path / "mix.jsonl"

    main([str(tmp_path / "bridges.jsonl"), "--out", str(out), "--k", "3", "--cap", "bridges=6"])

    rows = load_questions(out)
    assert len(rows) == 6
    assert {len(row.documents) for row in rows} == {3}
    passages = {document for row in rows for document in row.documents}
    assert json.loads(out.read_text().splitlines()[0]) == {"format": 1, "passages": len(passages)}


def test_a_cap_without_a_number_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["in.jsonl", "--out", "out.jsonl", "--cap", "bridges"])

    assert "expected SOURCE=NUMBER, found 'bridges'" in capsys.readouterr().err
