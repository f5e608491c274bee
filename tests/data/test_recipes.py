"""What `--data` may say."""

import pytest

from l2a_jax.data.recipes import RECIPES, resolve
from l2a_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    names = ("narrative_a.jsonl", "narrative_b.txt", "math_a.jsonl.gz", "code_x.txt", "science_x.jsonl", "notes.md",
             "wikitext_train.txt", "wikitext_test.txt", "wiki.train.tokens")  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("x")
    return tmp_path


def names(domains):
    return {domain.name: [file.name for file in domain.files] for domain in domains}


def test_recipes_come_from_the_hub_by_default():
    assert [d.name for d in resolve(["diverse"])] == ["narrative", "math", "code", "science"]
    assert all(domain.hub and not domain.files for entry in RECIPES for domain in resolve(entry))


def test_local_files_take_the_place_of_the_hub(folder):
    assert names(resolve([f"diverse={folder}"])) == {
        "narrative": ["narrative_a.jsonl", "narrative_b.txt"],
        "math": ["math_a.jsonl.gz"],
        "code": ["code_x.txt"],
        "science": ["science_x.jsonl"],
    }
    assert all(domain.hub is None and domain.weight == 1 for domain in resolve(f"diverse={folder}"))


def test_a_folder_of_wikitext_never_gives_its_test_set(folder):
    assert names(resolve(f"wikitext={folder}")) == {"wikitext": ["wiki.train.tokens", "wikitext_train.txt"]}
    (folder / "wiki.TEST.raw").write_text("x")
    (folder / "wiki.Valid.raw").write_text("x")
    assert names(resolve(f"wikitext={folder}")) == {"wikitext": ["wiki.train.tokens", "wikitext_train.txt"]}
    assert names(resolve(f"wikitext={folder}/code_x.txt")) == {"wikitext": ["code_x.txt"]}


def test_files_folders_and_globs_are_one_domain_each_file_once(folder):
    found = resolve([str(folder / "code_x.txt"), str(folder / "*.txt"), str(folder)])
    assert len(found) == 1 and found[0].name == "files"
    assert len(found[0].files) == len(set(found[0].files)) == 8, "everything but notes.md"


def test_named_files_are_a_domain_of_their_own(folder):
    found = resolve([f"mine={folder / 'code_x.txt'}", f"mine={folder / 'math_a.jsonl.gz'}", str(folder / "notes*")][:2])
    assert names(found) == {"mine": ["code_x.txt", "math_a.jsonl.gz"]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("divers", "neither a recipe nor a file; did you mean 'diverse'"),
        ("nothing", "neither a recipe nor a file; expected 'wikitext' or 'diverse', or files"),
        ("", "an empty name; expected a file"),
        ("notes=", "an empty name"),
        ("diverse= ", "an empty name"),
        ("divers={}", "no recipe is called 'divers'; did you mean 'diverse'"),
        ("{}/none-*.jsonl", "no file matches"),
        ("{}/none.txt", "no file matches"),
        ("wikitext={}/absent", "no file matches"),
        ("{}/notes.md", r"notes.md is no .txt, .*\.parquet file"),
    ],
)
def test_entries_that_mean_nothing(folder, entry, message):
    entry = entry.format(folder)
    with pytest.raises(UserError, match=message):
        resolve([entry])


def test_folders_without_text(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder holds no .txt"):
        resolve(str(tmp_path / "empty"))
    (folder / "science_x.jsonl").unlink()
    with pytest.raises(UserError, match=r"no file is named science_\* for the domain 'science'; expected narrative_\*"):
        resolve(f"diverse={folder}")
    with pytest.raises(UserError, match="--data names nothing"):
        resolve([])


def test_one_domain_cannot_come_from_two_places(folder):
    (folder / "science_x.jsonl").touch()
    with pytest.raises(UserError, match="'narrative' is already given"):
        resolve(["diverse", f"diverse={folder}"])
