"""A language model that says whether answers are right, for what word overlap cannot see."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from softrag.chat_endpoint import ChatEndpoint
from softrag.evaluation import Question

PROMPT = """\
You judge answers to questions. Decide whether the candidate answer says the same as one of the \
accepted answers. Ignore its wording and length; extra information is fine unless it contradicts.

Question: {question}
Accepted answers: {answers}
Candidate answer: {answer}

Reply with one word: yes or no."""

_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def judge_answers(
    endpoint: ChatEndpoint, questions: Sequence[Question], answers: Sequence[str]
) -> tuple[np.ndarray, int]:
    """Return `(questions,)` verdicts in percent, 0 or 100, and how many were neither yes nor no.

    An unclear verdict counts as no; a blank answer is wrong without asking.

    Raises:
        EndpointError: The judge cannot be asked.
    """
    asked = [place for place, answer in enumerate(answers) if answer.strip()]
    replies = endpoint.complete(
        [
            PROMPT.format(
                question=questions[place].question,
                answers=" | ".join(questions[place].answers),
                answer=answers[place],
            )
            for place in asked
        ],
        # Room for a judge that begins with a word of its own.
        max_tokens=16,
    )
    verdicts = np.zeros(len(answers))
    unclear = 0
    for place, reply in zip(asked, replies, strict=True):
        found = _VERDICT.search(reply)
        unclear += found is None
        verdicts[place] = 100.0 * (found is not None and found[1].lower() == "yes")
    return verdicts, unclear
