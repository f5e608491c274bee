"""The frontier of several runs: which curves it draws, and what it refuses."""

import json
import pathlib

import numpy as np
import pytest

from l2a_jax.errors import UserError
from l2a_jax.research.rivals import frontier
from l2a_jax.research.rivals.options import FrontierOptions

LONG = pathlib.Path(__file__).parents[3] / "eval/results/long"
FILES = (LONG / "strict/rivals.json", LONG / "far/rivals.json")


def test_the_published_tables_are_drawn(tmp_path):
    options = FrontierOptions(compare=FILES, names=("a", "b"), out=tmp_path)
    assert frontier.compare(options) == tmp_path / "frontier.png"
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_points_are_those_of_the_rows():
    found = json.loads(FILES[0].read_text())
    row = next(row for row in found["rows"] if row["name"] == "heads" and row["own"])
    assert frontier._kept(row) == (1 - row["density"], row["kept"], row["kept_95"])
    local, mean, (low, high) = frontier._ruler(row)
    assert local == pytest.approx(row["ruler_local"]) and mean == pytest.approx(100 * row["ruler_mean"])
    assert low < mean < high
    assert frontier._prefill(row)[1] is None
    oracle = next(row for row in found["rows"] if row["name"] == "oracle")
    assert frontier._ruler(oracle)[1] is None and frontier._prefill(oracle)[1] == oracle["prefill_ms"]
    y = np.array([-3.0, 0.0, 0.4, 1.0, 2.7])
    np.testing.assert_allclose(frontier._released(frontier._pressed(y)), y)


def test_what_was_not_measured_leaves_its_panel_empty(tmp_path):
    found = json.loads(FILES[0].read_text()) | {"lengths": []}
    found["rows"] = [{key: value for key, value in row.items() if not key.startswith(("ruler", "prefill"))}
                     for row in found["rows"]]
    (tmp_path / "rivals.json").write_text(json.dumps(found))
    assert frontier.compare(FrontierOptions(compare=(tmp_path / "rivals.json",), out=tmp_path)).exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"context": 8_192}, "context is 8192, and that of"),
    ({"text": {"name": "t", "hash": "another"}}, "text is 'another', and that of"),
    ({"answers": "choice"}, "answers is 'choice', and that of"),
    ({"rows": [{"name": "learned"}]}, "density is missing"),
])
def test_other_texts_and_other_files_are_refused(tmp_path, change, said):
    (tmp_path / "rivals.json").write_text(json.dumps(json.loads(FILES[1].read_text()) | change))
    with pytest.raises(UserError, match=rf"rivals\.json: .*{said}"):
        frontier.compare(FrontierOptions(compare=(FILES[0], tmp_path / "rivals.json"), out=tmp_path))


def test_a_name_for_each_file(tmp_path):
    with pytest.raises(UserError, match="--names gives 1 names for 2 files of --compare"):
        frontier.compare(FrontierOptions(compare=FILES, names=("a",), out=tmp_path))
