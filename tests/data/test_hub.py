"""Hub recipes without a network: a stand-in for `datasets`, and the one error there is when nothing answers."""

import sys
import types

import pytest

from l2a_jax.data.recipes import RECIPES, Domain, Hub, resolve
from l2a_jax.data.text import fragments
from l2a_jax.errors import UserError


@pytest.fixture
def hub(monkeypatch):
    """hub(rows): a hub on which every data set has these rows; an exception instead of rows is raised."""

    def hub(rows):
        def load_dataset(path, config, *, split, streaming, revision):
            assert streaming and revision == "abc"
            return rows

        def dataset_info(self, path, timeout):
            if isinstance(rows, Exception):
                raise rows
            return types.SimpleNamespace(sha="abc")

        datasets = types.ModuleType("datasets")
        datasets.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        api = type("HfApi", (), {"dataset_info": dataset_info})
        monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=api))

    return hub


def test_wikitext_rows_are_lines_and_become_articles(hub):
    hub(
        [
            {"text": t}
            for t in ("", " = One = \n", "", " text \n", "", " = = Sub = = \n", "", " = Two = \n", "", " b \n")
        ]
    )
    (domain,) = resolve("wikitext")
    found = list(fragments(domain))
    assert [f.identity for f in found if f.starts] == [None, "One", "Two"]
    assert "".join(f.text for f in found).startswith(" \n = One = \n \n text \n \n")


def test_a_hub_recipe_stops_after_its_characters(hub, opened, monkeypatch):
    hub([{"text": f"document {i} " * 5} for i in range(1000)])
    small = Domain("tiny", "tiny", 1.0, hub=Hub("some/where", characters=1000))
    monkeypatch.setitem(RECIPES, "tiny", (small,))
    data = opened("tiny", held_out=0.0)
    assert data.describe()["documents"] == 18
    assert data.fingerprint == opened("tiny", held_out=0.0).fingerprint


@pytest.mark.parametrize("recipe", ["wikitext", "diverse"])
def test_without_a_network_one_error_says_how_to_give_files(hub, opened, recipe):
    class ConnectError(Exception):
        """As httpx raises: no OSError."""

    hub(ConnectError("name or service\n not known"))
    message = rf"cannot be read from the Hugging Face hub \(ConnectError: name or service not known\).*{recipe}=DIR"
    with pytest.raises(UserError, match=message):
        opened(recipe)


def test_without_datasets_the_error_says_what_to_install(monkeypatch, opened):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = r"pip install 'l2a-jax\[data\]'.*--data diverse=DIR, a folder of .*narrative_\*"
    with pytest.raises(UserError, match=message):
        opened("diverse")
