import random
import re
from dataclasses import replace

import pytest

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.recall import RECORD_TOKENS
from think_vllm.tools.eval.tasks import TASKS, check_tasks, make_questions
from think_vllm.tools.eval.tasks.haystack import Frame, as_english, hide, read_sentences

ON_GRID = [name for name, task in TASKS.items() if task.has_depth]
LENGTHS = (700, 2048)


def count_words(text: str) -> int:
    """Tokens of the bundled model: one a word, and the first one."""
    return 1 + len(text.split())


FRAME = Frame(length=0, depth=None, count=count_words)


def make(names, lengths=LENGTHS, depths=(0.0, 0.3, 1.0), samples=3, seed=0, frame=FRAME):
    return make_questions(names, lengths, depths, samples, seed, frame, threads=2)


@pytest.mark.parametrize("name", TASKS)
def test_make_questions_fills_every_length(name):
    for question in make([name]):
        assert question.prompt_tokens == count_words(question.prompt)
        total = question.prompt_tokens + question.max_tokens
        # One sentence does not fit any more.
        assert question.length - 20 < total <= question.length


@pytest.mark.parametrize("name", TASKS)
def test_make_questions_asks_every_cell(name):
    cells = [(q.length, q.depth, q.number) for q in make([name])]
    depths = (0.0, 0.3, 1.0) if TASKS[name].has_depth else (None,)
    assert cells == [(n, d, i) for n in LENGTHS for d in depths for i in range(3)]


def test_make_questions_depends_on_its_seed():
    assert make(list(TASKS)) == make(list(TASKS))
    prompts = {q.prompt for seed in (0, 1) for q in make(list(TASKS), seed=seed)}
    assert len(prompts) == 2 * len(make(list(TASKS)))


@pytest.mark.parametrize("name", ON_GRID)
def test_fact_is_where_it_should_be(name):
    for question in make([name], depths=(0.0, 0.1, 0.5, 0.77, 1.0)):
        text, fact = _text_and_fact(question)
        before, _, after = text.partition(fact)
        words = len(before.split()), len(after.split())
        # Sentences and records have 10 words at most, so the nearest seam is 5 away.
        assert abs(words[0] - question.depth * sum(words)) <= RECORD_TOKENS / 2


@pytest.mark.parametrize("name", ["needle", "multi-key", "multi-value", "multi-query"])
def test_answers_are_stated_once(name):
    for question in make([name]):
        for answer in question.answers:
            assert len(re.findall(rf"\b{answer}\b", question.prompt)) == 1
        assert question.score(" and ".join(question.answers)) == 1.0
        # The question itself holds no answer.
        assert question.score(question.prompt.rpartition("\n\n")[2]) == 0.0


@pytest.mark.parametrize("name", ["recall", "recall-needle", "recall-keys"])
def test_recall_asks_for_a_record_stated_once(name):
    for question in make([name]):
        key = question.prompt.split()[-1]
        facts = f"the code of {key} is {question.answers[0]} ."
        assert question.prompt.count(facts) == 1
        assert question.prompt.count(f" {key} is") == 1
        assert question.prompt.endswith(f"what is the code of {key}")
        records = question.prompt.count(" is ") - 1
        assert records == (1 if name == "recall-needle" else question.length // 20)


def test_recall_rejects_other_tokenizers():
    frame = replace(FRAME, count=lambda text: len(text) // 2)
    with pytest.raises(ThinkError, match="this is not the bundled model"):
        make(["recall-needle"], lengths=(4000,), frame=frame)


def test_multi_value_and_query_ask_for_all():
    for question in make(["multi-value", "multi-query"]):
        assert len(set(question.answers)) == 4
        assert question.score(question.answers[0]) == 0.25
        assert not question.is_binary


def test_multi_key_distracts_with_other_keys():
    for question in make(["multi-key"]):
        facts = re.findall(r"numbers of the ([\w-]+) is (\d+)\.", question.prompt)
        assert len(dict(facts)) == 4
        (asked,) = re.findall(r"What is the secret number of the ([\w-]+)\?", question.prompt)
        assert question.answers == (dict(facts)[asked],)


@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_is_rejected(name):
    with pytest.raises(ThinkError, match=r"--lengths .*is too short for it"):
        make([name], lengths=(11,))


def test_chat_prompts_begin_no_answer():
    for question in make(["needle"], frame=replace(FRAME, chat=True)):
        assert question.prompt.endswith("?")
        assert "Answer:" not in question.prompt


def test_max_tokens_is_reserved():
    (question,) = make(["needle"], (700,), (0.5,), samples=1, frame=replace(FRAME, max_tokens=300))
    assert question.max_tokens == 300
    assert 380 < question.prompt_tokens <= 400


def test_haystack_is_cut_into_sentences(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One is here.  Two\nis 1234567 there! Three? " * 3, encoding="utf-8")
    sentences = read_sentences(path)
    assert sentences[:3] == ("One is here.", "Two is 1234567 there!", "Three?")
    for question in make(["needle"], frame=replace(FRAME, sentences=sentences)):
        assert "Two is 1234567 there! Three? One is here." in question.prompt


def test_haystack_is_cleaned_of_what_is_asked():
    # The same seed draws the same numbers, which this text happens to hold.
    (before,) = make(["needle"], (700,), (0.5,), samples=1)
    number = re.findall(r"\d{7}", before.prompt)[0]
    sentences = (f"It cost {number} pounds.", "It was worth it.")
    frame = replace(FRAME, sentences=sentences)
    (question,) = make(["needle"], (700,), (0.5,), samples=1, frame=frame)
    assert question.answers == before.answers
    assert "It was worth it." in question.prompt
    assert f"It cost {number} pounds." not in question.prompt


def test_hide_keeps_the_order_of_one_place():
    sentences = ["a b", "c d"]
    hidden = hide(sentences, [(0.5, "x"), (0.5, "y"), (1.0, "z"), (0.0, "w")])
    assert hidden == ["w", "a b", "x", "y", "c d", "z"]
    assert hide([], [(0.5, "x")]) == ["x"]


def test_fill_stops_at_the_longest_prompt_that_fits():
    rng = random.Random(0)
    for room in range(10, 400, 7):
        sizes = [rng.randrange(1, 12) for _ in range(500)]

        def build(count: int, sizes: list[int] = sizes) -> str:
            return " ".join(["w"] * sum(sizes[:count]))

        frame = replace(FRAME, length=room + 3)
        _, used = frame.fill("task", build, 3)
        fits = [1 + sum(sizes[:n]) for n in range(500) if 1 + sum(sizes[:n]) <= room]
        assert used == max(fits)


def test_check_tasks_names_those_there_are():
    message = r"needles is no task; there are needle,.*tasks of --harness"
    with pytest.raises(ThinkError, match=message):
        check_tasks(["needle", "needles"])


def test_as_english_writes_a_sentence():
    assert as_english("the old mill visits the pond .") == "The old mill visits the pond."


def _text_and_fact(question):
    if question.metric == "recall":
        key = question.prompt.split()[-1]
        text = question.prompt.rpartition(" what is the code of")[0]
        return text, f"the code of {key} is {question.answers[0]} ."
    text = question.prompt.split("\n\n")[1]
    (fact,) = re.findall(rf"One of the secret numbers[^.]*{question.answers[0]}\.", text)
    return text, fact
