"""RULER's prompts: exact to the token, with their answers inside, and the same for the same seed; lm-eval's scores."""

import gc
import json
import re
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest

from l2a_jax.errors import UserError
from l2a_jax.evaluation import ruler_source, ruler_text
from l2a_jax.evaluation.ruler_source import QUESTIONS, USUAL, score, settings
from l2a_jax.evaluation.ruler_text import build, calibrate, material
from tests.evaluation.ruler_cases import prose, small_tokenizer

LENGTHS = {"niah_multikey_3": 2_000, "vt": 2_500, "cwe": 2_001}
"""Where 1,501 tokens of this tokenizer, which has few pairs, are too short."""


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def novel(tmp_path_factory):
    path = tmp_path_factory.mktemp("hay") / "novel.txt"
    path.write_text(prose(12_000))
    return str(path)


@pytest.fixture(scope="module")
def made_of(tokenizer, novel):
    """As where wonderwords is not installed: the words, too, are the novel's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wonderwords", None)
        return material(tokenizer, USUAL, 2_500, (novel,), None)


def text_of(tokenizer, item):
    return tokenizer.decode(item.tokens.tolist())


@pytest.mark.parametrize("task", USUAL)
def test_prompts_are_exact_and_hold_their_answers(task, tokenizer, made_of):
    length = LENGTHS.get(task, 1_501)
    units = calibrate(task, length, 0, made_of)
    items = [build(task, length, number, 0, made_of, units) for number in range(4)]
    for item in items:
        assert len(item.tokens) + settings(task).new_tokens == length
        text = text_of(tokenizer, item)
        assert tokenizer.encode(text) == item.tokens.tolist()
        question = text.rindex("\nQuestion" if task in ("vt", "cwe", "fwe") else "\nWhat")
        for answer in item.answers:
            assert answer in text[:question] and answer not in text[question:]
    assert len({tuple(item.answers) for item in items}) == len(items)
    again = build(task, length, 2, 0, made_of, units)
    assert again.answers == items[2].answers and (again.tokens == items[2].tokens).all()
    assert build(task, length, 2, 1, made_of, units).answers != items[2].answers
    hidden, wanted = {"niah_multivalue": (4, 4), "niah_multiquery": (4, 4), "niah_multikey_1": (4, 1)}.get(task, (1, 1))
    if task.startswith("niah") and task not in ("niah_multikey_2", "niah_multikey_3"):
        assert text.count("One of the special magic") == hidden and len(item.answers) == wanted
    ending = {"vt": "they are:", "cwe": "in the list are:", "fwe": "words are:"}.get(task)
    assert text.endswith(ending or ("is" if wanted == 1 else "are"))


def test_the_cut_is_at_the_haystacks_beginning(tokenizer, made_of, novel):
    """All but the first word is whole: the published noise, line by line, and prose as it stands in its file."""
    units = calibrate("niah_single_1", 1_501, 0, made_of)
    text = text_of(tokenizer, build("niah_single_1", 1_501, 0, 0, made_of, units))
    head, first, *lines, question = text.split("\n")
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    assert head == ("A special magic number is hidden within the following text. Make sure to memorize it. I will quiz "
                    "you about the number afterwards.") and noise.endswith(first)
    needle = next(line for line in lines if line != noise)
    found = re.fullmatch(r"One of the special magic numbers for (\S+) is: (\d{7})\.", needle)
    assert question == (f"What is the special magic number for {found[1]} mentioned in the provided text? "
                        f"The special magic number for {found[1]} mentioned in the provided text is")
    units = calibrate("niah_single_2", 1_501, 0, made_of)
    text = text_of(tokenizer, build("niah_single_2", 1_501, 0, 0, made_of, units))
    hay = text.partition("\n")[2].rpartition("\n")[0]
    parts = re.split(r" ?One of the special magic numbers for \S+ is: \d{7}\. ?", hay)
    whole = " ".join(prose(12_000).split())
    assert len(parts) == 2 and " ".join(filter(None, parts)).partition(" ")[2] in whole
    assert parts[0] == "" or parts[0].rstrip('"')[-1] in ".!?"


def test_a_list_keeps_its_most_frequent_words(tokenizer, made_of):
    for task, length, count in (("cwe", 2_001, 10), ("fwe", 1_501, 3)):
        item = build(task, length, 0, 0, made_of, calibrate(task, length, 0, made_of))
        hay = text_of(tokenizer, item).rpartition("\nQuestion")[0].split()
        counts = {word: hay.count(word) for word in set(hay) if re.fullmatch("[a-z]+", word)}
        assert sorted(item.answers) == sorted(sorted(counts, key=counts.get)[-count:])


def test_lengths_and_haystacks_that_are_too_short_are_refused(tokenizer, made_of, tmp_path):
    with pytest.raises(UserError, match="a length of 300 is too short for RULER's niah_single_1"):
        calibrate("niah_single_1", 300, 0, made_of)
    short = tmp_path / "short.txt"
    short.write_text(prose(300))
    with pytest.raises(UserError, match=r"the haystack .*short.txt holds .* tokens; prompts of 4,096 need as many"):
        material(tokenizer, ("niah_single_2",), 4_096, (str(short),), None)
    with pytest.raises(UserError, match="no file, folder or pattern"):
        material(tokenizer, ("niah_single_2",), 4_096, (str(tmp_path / "absent"),), None)


def test_words_are_the_installed_ones_or_the_haystacks_and_the_result_says_so(tokenizer, made_of, novel, monkeypatch):
    assert "of the haystack's own" in made_of.about["words"] and not made_of.about["haystack"]["published"]
    lists = {"noun": ["cat", "dog"], "adjective": ["blue"], "verb": ["go"]}
    library = ModuleType("wonderwords")
    library.RandomWord = lambda enhanced_prefixes: SimpleNamespace(_categories=lists)
    monkeypatch.setitem(sys.modules, "wonderwords", library)
    monkeypatch.setattr(ruler_text.metadata, "version", lambda name: "9")
    mine = material(tokenizer, ("niah_single_1",), 1_501, None, None)
    assert mine.about == {"words": "wonderwords 9"} and mine.words[2] == ["blue", "cat", "dog", "go"]
    item = build("niah_single_1", 1_501, 0, 0, mine, calibrate("niah_single_1", 1_501, 0, mine))
    assert re.search(r"for blue-(cat|dog) is", text_of(tokenizer, item))
    with pytest.raises(UserError, match=r"RULER's cwe needs 20 different words .* there are 4"):
        calibrate("cwe", 1_501, 0, mine)


SCORES = [("vt", ["ABCDE", "XYZAB"], " abcde, and ABCDE", 0.5), ("cwe", ["one"], "\x00 two ", 0.0),
          ("niah_single_1", ["1234567"], " 1234567.", 1.0), ("qa_squad", ["Rome", "Paris"], "In paris", 0.5)]


@pytest.mark.parametrize(("task", "answers", "written", "expected"), SCORES)
def test_scores_are_literal(task, answers, written, expected):
    assert score(task, answers, written) == expected


@pytest.mark.torch  # transformers, which lm-eval's file imports
@pytest.mark.parametrize(("task", "answers", "written", "expected"), SCORES)
def test_scores_are_lm_evals(task, answers, written, expected):
    from lm_eval.tasks.ruler import common_utils

    scorer = common_utils.process_results_part if task in QUESTIONS else common_utils.process_results
    assert scorer({"max_length": 4_096, "outputs": answers}, [written])["4096"] == expected


def test_another_lm_eval_is_refused(monkeypatch):
    monkeypatch.setattr(ruler_source, "_read", lambda file: "task: other\n")
    with pytest.raises(UserError, match="says RULER's task vt in another way"):
        settings("vt")
    with pytest.raises(UserError, match="does not define nothing in its RULER"):
        ruler_source.definitions("vt_utils", ("nothing",))


def paragraphs():
    return [{"context": f"{prose(60, seed)}", "qas": [{"question": f"What is {seed}?", "is_impossible": False,
             "answers": [{"text": f"number {seed}"}]}]} for seed in range(80)]


def test_threads_may_read_one_file_at_once(monkeypatch):
    """Without the lock, most of these fail on Python 3.11.7: whatever lets another thread run amid a parse suffices."""
    assert score("vt", ["A"], "A") == 1.0  # the files are read
    often = lambda phase, info: sys.getswitchinterval()  # noqa: E731  Python code, so that threads change places here
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(10)
    gc.callbacks.append(often)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: ruler_source._compiled.__wrapped__("prepare_niah", ("NEEDLE",)), range(40)))
    finally:
        gc.callbacks.remove(often)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
    assert len(found) == 40


def test_questions_come_from_local_files(tokenizer, made_of, tmp_path, monkeypatch):
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs()}]}))
    mine = made_of._replace(read=lambda address: ruler_text._read_questions(tmp_path, address))
    length = 3_000
    items = [build("qa_squad", length, number, 0, mine, calibrate("qa_squad", length, 0, mine)) for number in range(3)]
    for item in items:
        text = text_of(tokenizer, item)
        assert len(item.tokens) + 32 == length and tokenizer.encode(text) == item.tokens.tolist()
        asked = re.search(r"Question: What is (\d+)\? Answer:$", text)
        assert item.answers == [f"number {asked[1]}"] and prose(60, int(asked[1])) in text
    with pytest.raises(UserError, match=r"hotpot_dev_distractor_v1.json"):
        calibrate("qa_hotpot", length, 0, mine)
    hotpot = tmp_path / "hotpot_dev_distractor_v1.json"
    hotpot.write_text(json.dumps([{"question": "Who?", "answer": f"number {seed}", "context": [
        [f"Title {seed} {part}", [prose(20, 100 * seed + part)]] for part in range(2)]} for seed in range(50)]))
    item = build("qa_hotpot", length, 0, 0, mine, calibrate("qa_hotpot", length, 0, mine))
    found = re.search(r"number (\d+)", item.answers[0])[1]
    assert all(f"Title {found} {part}\n" in text_of(tokenizer, item) for part in range(2))
    hotpot.write_text(json.dumps([{"question": "Who?"}]))
    with pytest.raises(UserError, match=r"hotpot_dev_distractor_v1.json holds no questions as http"):
        calibrate("qa_hotpot", length, 0, mine._replace(
            read=lambda address: ruler_text._read_questions(tmp_path, address)))

    def unreachable(*given, **more):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(ruler_text.urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"cannot be had from .*hotpot.*--task-data DIR"):
        ruler_text._read_questions(None, "https://host/hotpot.json")
