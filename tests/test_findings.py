"What findings and ablations leave behind: executed notebooks, and tables that other pages quote."

import json
import re

import pandas as pd
import pytest
from conftest import ROOT

NBS = ROOT / "nbs"
RESULTS = sorted((NBS / "data" / "results").glob("*.csv"))
COLUMNS = "name kind item quantity estimate low high p n unit verdict sentence".split()


def test_there_are_results():
    assert RESULTS


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_a_table_of_results_keeps_the_contract(path):
    table = pd.read_csv(path)
    assert list(table) == COLUMNS
    assert (table["name"] == path.stem).all()
    assert table["kind"].isin(["real slides", "real tissue", "phantom"]).all()
    assert table["verdict"].dropna().isin(["supports", "contradicts", "leaves open"]).all()
    judged = table[table["verdict"].notna()]
    assert len(judged) and judged["sentence"].notna().all()
    numbers = table[table["verdict"].isna() & table["sentence"].isna()]
    assert numbers["estimate"].notna().all()
    both = numbers.dropna(subset=["low", "high"])
    assert (both["low"] <= both["high"]).all()
    auc = table[(table["unit"] == "AUC") & table["estimate"].notna()]
    assert auc["estimate"].between(0, 1).all() and auc[["low", "high"]].notna().all(axis=None)


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_the_notebook_of_a_table_is_executed_without_an_error(path):
    where = [p for p in NBS.rglob(f"{path.stem}.ipynb")]
    assert len(where) == 1, where
    cells = json.loads(where[0].read_text())["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2


def test_no_barcode_of_a_patient_is_published():
    for path in [*RESULTS, NBS / "findings" / "tcga.ipynb"]:
        assert not re.search("TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}", path.read_text())


def test_every_claim_of_the_paper_names_results_that_a_run_may_give():
    claims = pd.read_csv(NBS / "data" / "claims.csv", dtype=str)
    kinds = "mechanism,break condition,trade-off,failure signature,open question,next check,confidence".split(",")
    assert set(claims["kind"]) == set(kinds)
    for keys in claims["results"]:
        for key in keys.split(";"):
            assert key.count(":") == 1, key
