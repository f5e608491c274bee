"""`open_data` as the training loop sees it: what is in a batch, in which order, and for whom."""

import json

import numpy as np
import pytest

from l2a_jax.data.batch import TrainingData, decode_row
from l2a_jax.data.dataset import open_data
from l2a_jax.errors import UserError

END = 256


def same(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def contents(batches, tokenizer):
    """Texts of the segments of all rows."""
    found = []
    for batch in batches:
        for row in range(batch.tokens.shape[0]):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                ids = batch.tokens[row][batch.segment_ids[row] == segment]
                found.append(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
    return found


def epoch(data):
    return range(-(-data.describe()["rows"] // data.batch_size))


def test_a_batch_is_what_the_protocol_says(opened, write, texts, tokenizer):
    found = texts(60, 5, 400)
    data = opened(write("a.jsonl", found), held_out=0.0)
    assert isinstance(data, TrainingData)
    ends = {text + "<|endoftext|>" for text in found}
    for index in epoch(data):
        batch = data.batch(index)
        assert [a.dtype for a in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
        assert all(a.shape == (4, 128) for a in batch)
        for tokens, targets, weights, segments, positions in zip(*batch, strict=True):
            steps = np.diff(segments)
            real = segments > 0
            assert set(steps[real[1:]].tolist()) <= {0, 1} and not (real[1:] & ~real[:-1]).any()
            assert not weights[~real].any() and not positions[~real].any()
            for segment in range(1, segments.max() + 1):
                mine = np.flatnonzero(segments == segment)
                np.testing.assert_array_equal(positions[mine], np.arange(mine.size))
                # Inside the piece the target is the next token; at its end it is the document's, or does not count.
                np.testing.assert_array_equal(targets[mine[:-1]], tokens[mine[1:]])
                assert weights[mine[:-1]].all()
                assert weights[mine[-1]] == (tokens[mine[-1]] != END)
                text = tokenizer.decode(
                    [*tokens[mine].tolist(), int(targets[mine[-1]])][: mine.size + int(weights[mine[-1]])],
                    skip_special_tokens=False,
                )
                assert any(text in document for document in ends), "targets never cross documents"


def test_an_epoch_holds_every_document_whole_unless_it_is_longer_than_a_row(opened, write, texts, tokenizer):
    short, long = texts(40, 5, 120), texts(3, 300, 600, seed=9)
    data = opened(write("a.jsonl", short + long), held_out=0.0)
    found = contents((data.batch(i) for i in epoch(data)), tokenizer)
    for text in short:
        assert text + "<|endoftext|>" in found
    for text in long:
        whole = (text + "<|endoftext|>").encode()
        pieces = [whole[i : i + 128] for i in range(0, len(whole), 128) if len(whole) - i > 1]
        assert all(piece.decode() in found for piece in pieces)
    counted = sum(data.batch(i).weights.sum() for i in epoch(data))
    rows_over = len(epoch(data)) * 4 - data.describe()["rows"]  # rows of the next epoch in the last batch
    assert counted >= sum(len(t) for t in short + long) and rows_over < 4


def test_every_token_but_the_first_is_a_target_once_an_epoch(opened, write, texts):
    found = texts(30, 5, 600)
    for packing in ("best_fit", "concat"):
        data = opened(write("a.jsonl", found), held_out=0.0, packing=packing, batch_size=1)
        counted = sum(data.batch(i).weights.sum() for i in epoch(data))
        assert counted == sum(len(text) for text in found)


def test_concatenation_has_no_segments_and_still_no_target_across_documents(opened, write, texts, tokenizer):
    found = texts(30, 5, 200)
    data = opened(write("a.jsonl", found), held_out=0.0, packing="concat", batch_size=1)
    rows = [data.batch(i) for i in epoch(data)]
    assert all(b.segment_ids is None and b.positions is None for b in rows)
    for batch in rows:
        tokens, targets, weights = batch.tokens[0], batch.targets[0], batch.weights[0]
        inside = weights[:-1] > 0
        np.testing.assert_array_equal(targets[:-1][inside], tokens[1:][inside])
        assert (tokens[weights == 0] == END).all()
    assert data.describe()["packing_efficiency"] > 0.97
    assert (np.concatenate([b.tokens[0] for b in rows]) == END).sum() >= 30


def test_resume_is_the_same_batch_from_a_fresh_object_in_any_epoch(opened, write, texts):
    path = write("a.jsonl", texts(50))
    for packing in ("best_fit", "concat"):
        first = opened(path, packing=packing)
        run = [first.batch(i) for i in range(3 * len(epoch(first)))]
        second = opened(path, packing=packing)
        for index in (len(run) // 2, 0, len(run) - 1, len(epoch(first)), 1):
            same(second.batch(index), run[index])
        assert first.fingerprint == second.fingerprint


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(opened, write, texts):
    data = opened(write("a.jsonl", texts(100)), batch_size=1, held_out=0.0)
    rows = data.describe()["rows"]
    epochs = [[data.batch(e * rows + i).tokens.tobytes() for i in range(rows)] for e in range(3)]
    assert len(set(epochs[0])) == rows and set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_fingerprint_tells_orders_apart(opened, write, texts):
    a, b = write("a.jsonl", texts(50)), write("b.jsonl", texts(50, seed=1))
    variants = [{}, {"seed": 1}, {"batch_size": 8}, {"seq_len": 64}, {"packing": "concat"}, {"held_out": 0.5}]
    prints = [opened(a, **variant).fingerprint for variant in variants] + [opened(b).fingerprint]
    prints += [opened([f"x={a}", f"y={b}"], weights={"x": w}).fingerprint for w in (1.0, 2.0)]
    assert len(set(prints)) == len(prints)
    assert opened(a, process_index=1, process_count=2).fingerprint == prints[0], "hosts may come and go"


def test_hosts_share_a_batch(opened, write, texts):
    path = write("a.jsonl", texts(80))
    whole = opened(path, batch_size=4)
    parts = [opened(path, batch_size=4, process_index=p, process_count=2) for p in range(2)]
    for index in (0, 3, 50):
        halves = [part.batch(index) for part in parts]
        same([np.concatenate(arrays) for arrays in zip(*halves, strict=True)], whole.batch(index))
    for together, *halves in zip(whole.held_out(), *(part.held_out() for part in parts), strict=True):
        same([np.concatenate(arrays) for arrays in zip(*halves, strict=True)], together)


def test_shares_are_of_tokens_within_one_percent(opened, write, texts):
    """Domains whose rows are differently full, so that equal rows would not be equal tokens."""
    paths = {"full": texts(400, 120, 127), "half": texts(900, 64, 90, seed=1), "short": texts(2000, 5, 30, seed=2)}
    spec = [f"{name}={write(name + '.jsonl', found)}" for name, found in paths.items()]
    for weights in ({"full": 1.0, "half": 1.0, "short": 2.0}, {"full": 0.7, "half": 0.2, "short": 0.1}):
        data = opened(spec, weights=weights, batch_size=8)
        batches = 1_000_000 // (8 * 128)
        tokens = dict.fromkeys(paths, 0)
        for index in range(batches):
            filled = (data.batch(index).segment_ids > 0).sum(axis=1)
            for row, count in enumerate(filled.tolist()):
                tokens[data.parts[data.mix.locate(8 * index + row)[0]].domain.name] += count
        total = sum(tokens.values())
        for name, weight in weights.items():
            assert abs(tokens[name] / total - weight / sum(weights.values())) < 0.01
        used = data.usage(batches)
        assert {name: d["tokens"] for name, d in used["domains"].items()} == tokens
        assert used["tokens"] == total and used["domains"]["full"]["epochs"] > 1
        assert abs(data.tokens_per_batch * batches / total - 1) < 0.01


def test_without_weights_files_come_by_size_and_recipes_by_their_own(opened, write, texts, tmp_path):
    for name, count in (("narrative", 100), ("math", 50), ("code", 40), ("science", 30)):
        write(f"d/{name}_a.jsonl", texts(count, 100, 120, seed=count))
    other = write("other.jsonl", texts(220, 100, 120, seed=7))
    recipe = opened(f"diverse={tmp_path / 'd'}").describe()["domains"]
    assert {d["share"] for d in recipe.values()} == {0.25}
    mixed = opened([f"diverse={tmp_path / 'd'}", other]).describe()["domains"]
    assert abs(mixed["files"]["share"] - 0.5) < 0.02
    assert abs(mixed["math"]["share"] - 0.125) < 0.01


def test_weight_zero_leaves_a_domain_out_unread(opened, write, texts, tmp_path):
    a, broken = write("a.jsonl", texts(20)), tmp_path / "b.jsonl"
    broken.write_text("no json")
    data = opened([f"a={a}", f"b={broken}"], weights={"b": 0.0})
    assert list(data.describe()["domains"]) == ["a"] and data.describe()["dropped_domains"] == ["b"]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5])
def test_nothing_held_out_is_ever_trained_on(opened, write, texts, tokenizer, fraction):
    """Copies within a domain and between domains included."""
    first, second = texts(100, 5, 120), texts(100, 5, 120, seed=1)
    a = write("a.jsonl", first + first[:50])
    b = write("b.jsonl", second + first[25:75])
    data = opened([f"a={a}", f"b={b}"], held_out=fraction)
    held = set(contents(data.held_out(), tokenizer))
    trained = set(contents((data.batch(i) for i in range(3 * len(epoch(data)))), tokenizer))
    assert held and not held & trained
    assert held | trained == {text + "<|endoftext|>" for text in first + second}
    assert abs(len(held) / 200 - fraction) < 0.15
    assert held == set(contents(opened([f"a={a}", f"b={b}"], held_out=fraction, seed=9).held_out(), tokenizer))


def test_a_held_out_document_is_held_out_with_all_its_joined_parts(opened, write, texts, tokenizer):
    parts = [{"source": f"book {i // 5}", "text": text} for i, text in enumerate(texts(100, 10, 20))]
    path = write("d/narrative_a.jsonl", parts)
    for name in ("math", "code", "science"):
        write(f"d/{name}_a.txt", texts(1))
    data = opened(f"diverse={path.parent}", seq_len=256)
    assert data.describe()["domains"]["narrative"]["documents"] == 19, "20 books, one held out"
    (book,) = contents(data.held_out(), tokenizer)
    number = [p["source"] for p in parts if p["text"] in book]
    assert len(number) == 5 and len(set(number)) == 1
    assert book == "\n\n".join(p["text"] for p in parts if p["source"] == number[0]) + "<|endoftext|>"
    apart = opened(f"diverse={path.parent}", seq_len=256, join="")
    assert apart.describe()["domains"]["narrative"]["documents"] > 90


def test_two_spellings_of_one_article_fall_on_one_side(opened, write):
    def spelling(word):
        return "".join(f" \n = Title {i} = \n \n {word} number {i} . \n" for i in range(60))

    a, b = write("wikitext_raw.txt", [spelling("rare")]), write("wikitext_tokens.txt", [spelling("<unk>")])
    both = opened([f"wikitext={a}", f"wikitext={b}"], held_out=0.3).describe()
    assert both["documents"] + both["held_out_documents"] == 120
    assert both["held_out_documents"] % 2 == 0 and both["held_out_documents"] > 10


def test_held_out_batches_are_limited_whole_and_by_domain(opened, write, texts):
    spec = [f"{n}={write(n + '.jsonl', texts(100, 100, 120, seed=s))}" for s, n in enumerate("ab")]
    data = opened(spec, held_out=0.3)
    batches = list(data.held_out())
    assert all(batch.tokens.shape == (4, 128) for batch in batches)
    assert sum(b.weights.sum() for b in batches) == data.describe()["held_out_tokens"] - data.describe()[
        "held_out_documents"]  # fmt: skip
    assert len(list(data.held_out(2))) == 2
    same(next(data.held_out(1)), batches[0])
    only = [sum(b.weights.sum() for b in data.held_out(domain=name)) for name in "ab"]
    assert sum(only) == sum(b.weights.sum() for b in batches)
    with pytest.raises(UserError, match="no domain 'c'; expected one of a, b"):
        list(data.held_out(domain="c"))


def test_small_corpora(opened, write, texts):
    one = opened(write("one.txt", ["just one document, smaller than a row"]))
    assert one.describe()["documents"] == 1 and list(one.held_out()) == []
    batch = one.batch(0)
    assert (batch.tokens == batch.tokens[0]).all() and batch.weights.sum() == 4 * 37
    same(one.batch(5), batch)
    assert one.usage(2)["domains"]["files"]["epochs"] == 8
    book = opened(write("book.txt", ["long " * 500]), batch_size=64)
    assert book.describe()["rows"] == 20 and book.batch(0).tokens.shape == (64, 128)


def test_the_description_is_json_and_counts(opened, write, texts):
    found = texts(100, 20, 300)
    data = opened(write("a.jsonl", found + found[:10] + [""]))
    said = data.describe()
    assert json.loads(json.dumps(said)) == said
    files = said["domains"]["files"]
    assert files["documents"] + files["held_out_documents"] == 110 and files["empty_documents"] == 1
    assert said["tokens"] + said["held_out_tokens"] == sum(len(t) + 1 for t in found + found[:10])
    assert said["unique_tokens"] < said["tokens"]
    assert 0.95 < said["packing_efficiency"] <= 1
    once = data.usage(1)
    assert once["tokens"] == once["unique_tokens"] == (data.batch(0).segment_ids > 0).sum()
    many = data.usage(10_000)
    left_over = sum((len(t) + 1) % 128 == 1 for t in found + found[:10] if len(t) >= 128)  # end tokens, only targets
    assert 0 <= said["tokens"] - many["unique_tokens"] <= left_over and many["tokens"] > 100 * said["tokens"]


def test_a_part_of_the_text_over_and_over(opened, write, texts):
    """So many tokens, each domain its share, the same ones for every seed, as often as the run lasts."""
    a, b = write("a.jsonl", texts(300, 200, 900)), write("b.jsonl", texts(100, 200, 900, seed=1))
    whole, part, other = (opened([f"x={a}", f"y={b}"], weights={"x": 3.0, "y": 1.0}, **options) for options in (
        {}, {"unique": 8_000}, {"unique": 8_000, "seed": 1}))
    said, used = part.describe(), part.usage(2_000)
    assert 8_000 <= said["tokens"] == said["unique_tokens"] == used["unique_tokens"] < 8_000 + 2 * 128
    assert abs(said["domains"]["x"]["tokens"] - 6_000) <= 128 and used["tokens"] > 100 * used["unique_tokens"]
    assert said["documents"] < whole.describe()["documents"] and said["unique"] == 8_000
    rows = [{row.tobytes() for index in range(200) for row in data.batch(index).tokens} for data in (part, other)]
    assert rows[0] == rows[1] and len(rows[0]) == said["rows"]
    assert len({data.fingerprint for data in (whole, part, other)}) == 3
    held = [np.concatenate([batch.tokens for batch in data.held_out()]).sum() for data in (whole, part)]
    assert held[0] == held[1], "what is held out stays"


def test_a_row_as_text(opened, write, tokenizer):
    data = opened(write("a.jsonl", ["first document", "second " + "x" * 80]), held_out=0.0, batch_size=1)
    text = decode_row(data.batch(0), 0, tokenizer, characters=40)
    assert "--- document 2: 88 tokens from 15, 87 of them with a target" in text
    assert "first document<|endoftext|>" in text and "characters ..." in text
    assert text.endswith("--- padding: 25 tokens")
    concat = opened(write("a.jsonl", ["first document"]), held_out=0.0, batch_size=1, packing="concat")
    assert "first document" in decode_row(concat.batch(0), 0, tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "sequence length is 1; expected at least 2"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"packing": "tight"}, "packing is 'tight'; expected one of best_fit, concat"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2; expected 0 to 1"),
        ({"process_count": 3}, "4 rows does not divide among 3 processes"),
        ({"weights": {"a": 1.0}}, "names the domain 'a'; expected one of files"),
        ({"weights": {"files": -1.0}}, "the weight of 'files' is -1"),
        ({"weights": {"files": float("nan")}}, "the weight of 'files' is nan"),
        ({"unique": 10**6}, r"--unique is 1,000,000 tokens, and there are \d+ to train on"),
        ({"weights": {"files": 0.0}}, "every domain has weight 0"),
    ],
)
def test_arguments_that_mean_nothing(opened, write, texts, options, message):
    with pytest.raises(UserError, match=message):
        opened(write("a.jsonl", texts(5)), **options)


def test_a_domain_of_copies_of_what_another_holds_out(opened, write, texts):
    found = texts(50)
    a = write("a.jsonl", found)
    held = opened([f"a={a}"], held_out=0.3).parts[0].held_out_documents
    b = write("b.jsonl", [found[int(held[0])]])
    with pytest.raises(UserError, match="domain 'b' has no document to train on"):
        opened([f"a={a}", f"b={b}"], held_out=0.3)


@pytest.mark.parametrize("size", [256, 122, 1])
def test_text_with_ids_beyond_the_embedding_is_refused(opened, write, size):
    """The end mark is 256 and stands in every text, `z` is the largest of the others."""
    path = write("a.txt", ["a to z"])
    with pytest.raises(UserError, match=rf"gives id 256 for the domain 'mine' of --data, .*vocabulary has {size} rows"):
        opened([f"mine={path}"], vocab_size=size)
    again = opened([f"mine={path}"], vocab_size=257)
    assert again.fingerprint == opened([f"mine={path}"]).fingerprint, "a check is no part of the data"


def test_ids_that_no_text_uses_may_lie_beyond_the_embedding(tokenizer, write, tmp_path):
    """As in Qwen2.5, whose tokenizer is given more special tokens than one model or another has rows for."""
    wide = type(tokenizer).from_str(tokenizer.to_str())
    wide.add_special_tokens(["<|one|>", "<|two|>"])
    options = {"seq_len": 8, "batch_size": 1, "seed": 0, "cache_dir": tmp_path / "cache", "vocab_size": 257}
    open_data([str(write("a.txt", ["plain text"]))], wide, **options)
    with pytest.raises(UserError, match="gives id 258"):
        open_data([str(write("b.txt", ["marked <|two|> text"]))], wide, **options)
