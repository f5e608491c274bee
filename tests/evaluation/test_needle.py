"""Needle prompts token by token, their scores against decoding step by step, and the embedded model's memory."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2a_jax.config import L2AConfig, ModelConfig
from l2a_jax.data import recall
from l2a_jax.errors import UserError
from l2a_jax.evaluation.needle import NeedleOptions, build_prompts, draw_heat_map, evaluate_needle, told
from l2a_jax.evaluation.needle_text import NEEDLE, OPENING, QUESTION, text_haystack
from l2a_jax.models.params import add_routing, init_params
from l2a_jax.models.transformer import forward
from l2a_jax.sources import TINY, Pretrained, load_pretrained
from tests.evaluation.byte_tokenizer import byte_tokenizer

CONFIG = ModelConfig(260, 16, 24, 1, 2, 1, 8, max_positions=2_048)
SENTENCES = ["The rain fell on the roof. ", "A dog barked twice. ", "Nobody came! ", "Was it late? ", "It was. "]


@pytest.fixture(scope="module")
def bytes_model():
    return Pretrained(CONFIG, None, init_params(CONFIG, jax.random.key(0)), byte_tokenizer(), "")


@pytest.fixture(scope="module")
def tiny():
    return load_pretrained(TINY, jnp.float32)


@pytest.fixture
def novel(tmp_path):
    """Two novels in parts, as a compressed file of records."""
    rng = np.random.default_rng(0)
    path = tmp_path / "novels.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for source in ("first", "second"):
            for part in range(3):
                text = f"{source} {part}. " + "".join(rng.choice(SENTENCES, 20))
                file.write(json.dumps({"source": source, "text": text.strip()}) + "\n")
    return path


def text_options(path, **changes):
    return NeedleOptions(**{"lengths": (700, 1_001), "depths": (0.0, 0.3, 1.0), "seeds": (0, 1), "distractors": 3,
                            "haystack": (str(path),)} | changes)


def test_prompts_are_exact_to_the_token(bytes_model, novel):
    prompts = build_prompts(bytes_model, text_options(novel))
    assert len(prompts) == 2 * 3 * 2
    tokenizer = bytes_model.tokenizer
    for prompt in prompts:
        assert len(prompt.tokens) + len(prompt.answer_tokens[0]) == prompt.length
        text, needle = tokenizer.decode(prompt.tokens), NEEDLE.format(key=prompt.key, answer=prompt.answers[0])
        assert text.startswith(OPENING) and text.count(needle) == 1
        # bytes are tokens here, so the space before the code, which all codes share, is the prompt's
        assert text.endswith(QUESTION.format(key=prompt.key) + " ")
        assert tokenizer.decode(prompt.answer_tokens[0]) == prompt.answers[0]
        hay = text[len(OPENING) : -len(QUESTION.format(key=prompt.key)) - 1].replace(needle, "")
        before = text.index(needle) - len(OPENING)
        assert prompt.position == text.index(needle)
        assert abs(before / len(hay) - prompt.depth) < 0.05
        assert hay in read_all(tokenizer, novel)
        assert prompt.depth in (0, 1) or hay[:before].rstrip()[-1] in ".!?"  # between sentences
    # a seed is one hay, key and code at every depth; another seed is another
    first, other = ([p for p in prompts if p.seed == seed and p.length == 1_001] for seed in (0, 1))
    assert len({(p.key, *p.answers) for p in first}) == 1 and first[0].key != other[0].key
    assert first[0].answers[0] != other[0].answers[0]


def read_all(tokenizer, path):
    hay = text_haystack((str(path),), tokenizer, 10, "source")
    whole = text_haystack((str(path),), tokenizer, hay.tokens.size, "source")
    return tokenizer.decode(whole.tokens.tolist())


def test_parts_of_a_novel_are_joined_in_order(bytes_model, novel):
    text = read_all(bytes_model.tokenizer, novel.parent)  # the folder
    places = [text.index(f"{source} {part}") for source in ("first", "second") for part in range(3)]
    assert places == sorted(places)
    assert text == read_all(bytes_model.tokenizer, novel.parent / "nov*.gz")  # a pattern


def test_distractors_have_the_form_of_the_answer_and_several_needles_are_in_the_hay(bytes_model, novel):
    for prompt in build_prompts(bytes_model, text_options(novel, needles=3, distractors=4, digits=4)):
        assert len(set(prompt.answers)) == 5 and all(len(code) == 4 and code.isdigit() for code in prompt.answers)
        text = bytes_model.tokenizer.decode(prompt.tokens)
        stated = [code in text for code in prompt.answers]
        assert stated == [True, True, True, False, False]  # the other needles' codes are the first distractors
        assert len(prompt.tokens) + len(prompt.answer_tokens[0]) == prompt.length


def test_scores_against_decoding_step_by_step(tiny):
    """Exact match is what greedy decoding writes, and ranks are those of the full forward pass's probabilities."""
    options = NeedleOptions(lengths=(64, 128), depths=(0.0, 1.0), seeds=(0, 1, 2), distractors=7)
    result = evaluate_needle(tiny, options)
    step = jax.jit(forward, static_argnums=(2, 3))
    for prompt, row in zip(build_prompts(tiny, options), result["prompts"], strict=True):
        assert (row["length"], row["depth"], row["seed"]) == (prompt.length, prompt.depth, prompt.seed)
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(prompt.tokens)] = prompt.tokens
        logits = np.asarray(step(tiny.params, jnp.asarray(padded), tiny.config, None).logits[0, len(prompt.tokens) - 1])
        written = int(logits.argmax())
        assert row["exact_match"] == (written == recall.IDS[prompt.answers[0]])
        scores = [logits[recall.IDS[answer]] for answer in prompt.answers]
        assert row["rank"] == 1 + sum(score >= scores[0] for score in scores[1:])
        assert row["log_probability"] == pytest.approx(float(jax.nn.log_softmax(logits)[recall.IDS[row["answer"]]]),
                                                       abs=1e-4)
        assert recall.IDS[row["best_distractor"]] == recall.IDS[prompt.answers[1 + int(np.argmax(scores[1:]))]]


def test_the_embedded_model_remembers_and_a_pruned_one_cannot(tiny):
    """128 tokens: in reach of the whole model, far beyond a window of 8 and what three layers of it carry on."""
    options = NeedleOptions(lengths=(128,), depths=(0.0, 0.5), seeds=tuple(range(8)))
    plain = evaluate_needle(tiny, options)
    layer = L2AConfig(window=8, sinks=0)
    routed = tiny._replace(l2a_config=layer, params=add_routing(tiny.params, tiny.config, layer))
    everything = evaluate_needle(routed, options)  # a new router routes every token: the same function
    pruned = routed._replace(l2a_config=dataclasses.replace(layer, pruned_layers=tuple(range(tiny.config.num_layers))))
    nothing = evaluate_needle(pruned, options)
    assert plain["overall"]["exact_match"] >= 0.75
    assert everything["exact_match"] == plain["exact_match"]
    assert nothing["overall"]["ranked_first"] <= 0.5 and nothing["overall"]["mean_rank"] > 2
    assert json.loads(json.dumps(plain)) == plain


def test_real_decoding_writes_what_teacher_forcing_says(tiny):
    options = NeedleOptions(lengths=(128,), depths=(0.0, 1.0), seeds=(0, 1, 2), generate=6)
    result = evaluate_needle(tiny, options)
    assert [one["answer"] for one in result["generated"]] == [one["answer"] for one in result["prompts"]]
    assert [one["exact_match"] for one in result["generated"]] == [one["exact_match"] for one in result["prompts"]]
    assert all(one["exact_match"] == (one["written"] == one["answer"]) for one in result["generated"])


def test_grids_table_and_picture(tiny, tmp_path):
    options = NeedleOptions(lengths=(64, 128), depths=(0.0, 1.0), seeds=(0, 1, 2))
    result = evaluate_needle(tiny, options)
    for name, pick in (("exact_match", lambda r: r["exact_match"]), ("ranked_first", lambda r: r["rank"] == 1),
                       ("mean_rank", lambda r: r["rank"])):
        for i, depth in enumerate(options.depths):
            for j, length in enumerate(options.lengths):
                rows = [pick(r) for r in result["prompts"] if r["depth"] == depth and r["length"] == length]
                assert len(rows) == 3 and result[name][i][j] == pytest.approx(np.mean(rows))
    table = told(result)
    assert table.count("\n") == 4 and "n = 12" in table
    path = tmp_path / "deep" / "needle.png"
    draw_heat_map(result, path)
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[0] > 200 and picture.shape[1] > 600 and picture.std() > 0.05
    assert [file.name for file in path.parent.iterdir()] == ["needle.png"]


@pytest.mark.parametrize("changes, message", [
    ({"lengths": (2_049,)}, "2049 tokens is longer than the model's positions, which end at 2048"),
    ({"lengths": (100,)}, "100 tokens is too short: the question, 1 needle.* alone need"),
    ({"haystack": ("recall",)}, "needs a model of the recall corpus's vocabulary"),
    ({"haystack": ("/nowhere/*.txt",)}, "/nowhere/.*txt is no file, folder or pattern"),
])
def test_what_cannot_be_built(bytes_model, novel, changes, message):
    with pytest.raises(UserError, match=message):
        build_prompts(bytes_model, text_options(novel, **changes))


def test_empty_and_short_haystacks(bytes_model, novel, tmp_path):
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text(" \n\n")
    short.write_text("Few words. " * 5)
    with pytest.raises(UserError, match=r"empty.txt holds no text"):
        build_prompts(bytes_model, text_options(empty))
    with pytest.raises(UserError, match=r"short.txt holds 5. tokens; the longest context needs 1001"):
        build_prompts(bytes_model, text_options(short))
    (tmp_path / "hay.bin").write_text("x")
    with pytest.raises(UserError, match=r"hay.bin is no .txt"):
        build_prompts(bytes_model, text_options(tmp_path / "hay.bin"))
    with pytest.raises(UserError, match="has no tokenizer"):
        build_prompts(bytes_model._replace(tokenizer=None), text_options(novel))


@pytest.mark.parametrize("changes, message", [
    ({"lengths": ()}, r"needle lengths is \(\); expected a list that is not empty"),
    ({"depths": (0.5, 1.5)}, "each between 0 and 1"), ({"depths": (float("nan"),)}, "each between 0 and 1"),
    ({"depths": (-0.5,)}, "each between 0 and 1"), ({"lengths": (-64,)}, "each at least 1"),
    ({"lengths": (2**31,)}, "each at least 1, at most"), ({"seeds": (-1,)}, "each at least 0"),
    ({"seeds": (2**63,)}, "each at least 0"), ({"digits": 10**6}, "digits is 1000000; expected between 1 and 18"),
    ({"distractors": 10**9}, "distractors is 1000000000"), ({"generate": -1}, "generate is -1"),
    ({"haystack": ()}, "haystack is"), ({"haystack": ("",)}, "haystack is"),
    ({"seeds": tuple(range(10_000))}, "has 200,000 prompts; expected at most 100,000"),
    ({"seeds": (1, 1)}, "each entry once"), ({"needles": 0}, "needles is 0"), ({"digits": 0}, "digits is 0"),
    ({"needles": 9}, "there are only 8 keys"), ({"haystack": ("recall", "x.txt")}, "cannot be mixed"),
    ({"haystack": ("x.txt",), "digits": 1, "distractors": 9}, "codes of 1 digits are only 9; 10 different"),
])
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        NeedleOptions(**changes)


def test_hay_and_answers_beyond_the_embedding_are_refused(bytes_model, novel):
    config = dataclasses.replace(bytes_model.config, vocab_size=100)  # the bytes' ids go to 255
    with pytest.raises(UserError, match=r"gives id \d+ for the haystack .*novel.*vocabulary has 100 rows"):
        build_prompts(bytes_model._replace(config=config), text_options(novel))
