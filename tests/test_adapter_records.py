"""What is computed of adapters outlives them, under a name that says what it is of; and stays what it was."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from lori_nb.lab import ledger
from lori_nb.method.adapters import Factors
from lori_nb.study import adapter_records, mergeability

ABOUT = {"what": "pairs", "recipe": 1, "runs": ("ab", "cd")}
# Of recipes 1 and 2, which differ for updates below full rank alone; six digits, which float32 factors give everywhere.
GOLDEN = {  # measure → (value, null) of a seen from b
    "cosine_size": (0.168194, 0.142145),
    "row_overlap": (0.235243, 0.4397),
    "column_overlap": (0.600159, 0.447302),
    "row_grassmann": (1.678822, 1.358735),
    "column_grassmann": (1.106753, 1.336137),
    "row_chordal": (1.234725, 1.037218),
    "column_chordal": (0.89425, 1.030687),
    "alignment": (0.52331, 0.559648),
    "singular_interference": (1.253702, 1.242869),
    "sign_conflict": (0.582126, 0.48125),
    "magnitude_overlap": (0.45, 0.0625),
    "mask_overlap": (0.944444, 0.951389),
    "total_cosine": (-0.157607, -0.000993),
}
TABLE = pd.DataFrame({"task": ["a", "b"], "value": [0.1, math.pi]})


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "ledger_folder", lambda: tmp_path / "ledger")
    monkeypatch.setenv("LORI_NB_HOME", str(tmp_path / "home"))


def never():
    raise AssertionError("computed although it is known")


def test_it_is_computed_once_and_copied_to_the_ledger_when_it_is_to_last(tmp_path):
    assert adapter_records.kept(ABOUT, None) is None
    pd.testing.assert_frame_equal(adapter_records.kept(ABOUT, TABLE.copy), TABLE)
    pd.testing.assert_frame_equal(adapter_records.kept(ABOUT, never), TABLE)
    assert not adapter_records.files()
    pd.testing.assert_frame_equal(adapter_records.kept(ABOUT, None, lasting=True), TABLE)
    (path,) = adapter_records.files()
    assert pd.read_parquet(path).attrs["about"] == {"what": "pairs", "recipe": 1, "runs": ["ab", "cd"]}
    assert adapter_records.kept(ABOUT | {"recipe": 2}, None) is None
    assert adapter_records.kept({"runs": ["ab", "cd"], "recipe": 1, "what": "pairs"}, None) is not None


def test_a_file_of_something_else_is_refused():
    adapter_records.kept(ABOUT, TABLE.copy, lasting=True)
    other = ABOUT | {"runs": ("ab", "ef")}
    adapter_records.kept(other, TABLE.copy, lasting=True)
    one, two = adapter_records.files()
    one.write_bytes(two.read_bytes())
    with pytest.raises(ValueError, match=r"must be of .*; found "):
        for about in (ABOUT, other):
            adapter_records.kept(about, None)


def tiny_adapters() -> dict[str, dict[str, Factors]]:
    """Factors of two modules, small tenths: the same on every machine."""
    shapes = {"q_proj": (5, 4), "down_proj": (4, 6)}

    def factors(seed: int, rows: int, columns: int) -> Factors:
        whole = (torch.arange(2 * (rows + columns)) * (seed + 3) % 11 - 5) / 10
        return Factors(whole[: 2 * columns].reshape(2, columns), whole[2 * columns :].reshape(rows, 2), 1.5)

    return {name: {m: factors(seed, *shape) for m, shape in shapes.items()} for seed, name in enumerate("ab")}


def test_overlaps_of_the_same_adapters_stay_what_they_were():
    """Numbers of earlier adapters are read from their records, beside new ones: who changes how a measure comes out
    raises ``mergeability.RECIPE``, and enters the new numbers here.
    """
    assert mergeability.RECIPE == 2
    found = mergeability.excess_of(tiny_adapters(), None, seed=0).drop_duplicates("measure").set_index("measure")
    assert list(found.index) == list(GOLDEN)
    for name, numbers in GOLDEN.items():
        assert tuple(found.loc[name, ["value", "null"]]) == pytest.approx(numbers, abs=2e-6), name
