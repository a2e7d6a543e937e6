"Properties of manifests and folds, searched by hypothesis: what notebook 01 states, on tables nobody thought of."

import csv, io, os, random, tempfile
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from her2_mil.cells import plain_cell
from her2_mil.clam import from_clam, to_clam
from her2_mil.cohort import (
    SCORES,
    ManifestError,
    _RULES,
    check_manifest,
    patient_folds,
    read_manifest,
    write_manifest,
)
from her2_mil.slide import SlideError, fetch_slide

quick = settings(
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", 25)),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
HEADER = [
    "slide_id",
    "patient_id",
    "her2_score",
    "uri",
    "sha256",
    "md5",
    "features",
    "mpp",
    "cohort",
    "ish",
    "roi",
    "roi_origin",
    "site",
]


def read(data, **kw):
    "`read_manifest` of bytes or text"
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / "m.csv"
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
        return read_manifest(path, **kw)


def table(rows, sep=","):
    "CSV text of a list of dicts"
    out = io.StringIO()
    w = csv.DictWriter(out, HEADER, delimiter=sep, restval="", lineterminator="\n")
    w.writeheader()
    w.writerows(rows)
    return out.getvalue()


def good_rows(n):
    "n valid rows, two slides a patient"
    return [
        dict(
            slide_id=f"s{i}",
            patient_id=f"p{i // 2}",
            her2_score=SCORES[i // 2 % 4],
            uri=f"slides/s{i}.svs",
            sha256=f"{i:064x}",
            mpp="0.25",
            site=f"site{i % 3}",
        )
        for i in range(n)
    ]


@st.composite
def cohorts(draw, sites=4):
    "A table with n_folds patients or more of each score that is there, several slides a patient, some external rows"
    n_folds = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.one_of(st.just(0), st.integers(n_folds, 20)), min_size=4, max_size=4).filter(any))
    rows, rng = [], random.Random(draw(st.integers(0, 2**32)))
    for p, s in enumerate(s for s, n in enumerate(sizes) for _ in range(n)):
        rows += [dict(patient_id=f"p{p}", y=s, cohort="main", site=f"site{rng.randrange(sites)}")] * rng.choice(
            [1, 1, 1, 2, 5]
        )
    rows += [
        dict(patient_id=f"x{p}", y=rng.randrange(4), cohort="external", site="elsewhere")
        for p in range(draw(st.integers(0, 5)))
    ]
    rng.shuffle(rows)
    return pd.DataFrame(rows), n_folds, draw(st.integers(0, 2**31))


@quick
@given(cohorts())
def test_folds_keep_their_promises(case):
    df, n_folds, seed = case
    fold = patient_folds(df, n_folds, seed)
    main = df["cohort"] == "main"
    assert fold.dtype == np.int64 and len(fold) == len(df)
    assert (fold[~main] == -1).all() and set(fold[main]) == set(range(n_folds))
    each = (
        df.assign(fold=fold)[main]
        .groupby("patient_id")
        .agg(fold=("fold", "first"), n=("fold", "nunique"), y=("y", "first"), slides=("y", "size"))
    )
    assert (each["n"] == 1).all(), "a patient is split over folds"
    by_score = pd.crosstab(each["fold"], each["y"])
    assert np.ptp(by_score.to_numpy(), axis=0).max() <= 1, "a score is uneven by more than one patient"
    assert np.ptp(by_score.sum(axis=1)) <= 1, "fold sizes differ by more than one patient"
    slides = pd.crosstab(each["fold"], each["y"], each["slides"], aggfunc="sum").fillna(0)
    assert np.ptp(slides.to_numpy(), axis=0).max() <= each["slides"].max(), (
        "slides of a score are uneven by more than one patient has"
    )


@quick
@given(cohorts(), st.randoms(use_true_random=False))
def test_folds_depend_on_patients_only(case, rng):
    df, n_folds, seed = case
    fold = patient_folds(df, n_folds, seed)
    order = rng.sample(range(len(df)), len(df))
    assert (patient_folds(df.iloc[order].reset_index(drop=True), n_folds, seed) == fold[order]).all()
    main = (df["cohort"] == "main").to_numpy()
    assert (patient_folds(df[main], n_folds, seed) == fold[main]).all()


@quick
@given(cohorts(sites=12))
def test_sites_stay_whole_or_it_is_said(case):
    df, n_folds, seed = case
    try:
        fold = patient_folds(df, n_folds, seed, by_site=True)
    except ManifestError as e:
        assert "folds that keep sites whole need" in str(e)
        return
    main = (df["cohort"] == "main").to_numpy()
    for column in ("site", "patient_id"):
        assert (pd.Series(fold[main]).groupby(df[column][main].to_numpy()).nunique() == 1).all()
    assert (pd.crosstab(fold[main], df["y"][main]) > 0).all(axis=None), "a fold lacks a score"


@quick
@given(st.lists(st.integers(0, 12), min_size=4, max_size=4).filter(any), st.integers(2, 6))
def test_infeasible_requests_give_the_counts(sizes, n_folds):
    y = np.repeat(np.arange(4), sizes)
    df = pd.DataFrame({"patient_id": [f"p{i}" for i in range(len(y))], "y": y})
    assume(any(0 < n < n_folds for n in sizes))
    with pytest.raises(ManifestError) as e:
        patient_folds(df, n_folds)
    for s, n in enumerate(sizes):
        assert n == 0 or f"{SCORES[s]}: {n}" in str(e.value)


BAD = dict(
    slide_id=["", "../x", "a b", ".a", "x" * 200, "=A1"],
    patient_id=["", "a/b", "@p", "\u00fcber"],
    her2_score=["", "4", "x", "0+", "ULTRALOW", "2.5", "=1"],
    uri=["", "../a.svs", "/a.svs", "http://a/b", "phantom:score=9;seed=1", "https://u:p@h/x", "a\\b"],
    sha256=["12", "z" * 64],
    md5=["ab" * 32, "x"],
    features=["/b/a.h5", "../a.pt"],
    roi_origin=["cropped", "0,0"],
    mpp=["0", "-1", "99", "nan", "abc", "1e999"],
    cohort=["training", "extern"],
    ish=["maybe"],
    roi=["../r.geojson", "C:/r.geojson"],
    site=["=1+1", "#REF!", "a\u202eb", "a\nb"],
)


@quick
@given(st.data())
def test_every_bad_cell_is_reported_and_no_other(data):
    rows = good_rows(data.draw(st.integers(2, 12)))
    where = data.draw(st.sets(st.tuples(st.integers(0, len(rows) - 1), st.sampled_from(HEADER)), max_size=6))
    for i, c in where:
        rows[i][c] = data.draw(st.sampled_from(BAD[c]))
    if not where:
        read(table(rows))
        return
    with pytest.raises(ManifestError) as e:
        read(table(rows, data.draw(st.sampled_from(",;\t"))))
    found = {(r - 2, c) for r, c, *_ in e.value.problems}
    assert found == where
    for r, c, v, why in e.value.problems:
        assert f"row {r}, column {c}, value " in str(e.value) and why in str(e.value)


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_row_numbers_count_empty_rows(gaps):
    rows, lines, number = good_rows(len(gaps)), [",".join(HEADER)], []
    for r, gap in zip(rows, gaps):
        lines += ["", "," * (len(HEADER) - 1)][:gap] + [""] * max(0, gap - 2)
        r["mpp"] = "77"
        lines.append(",".join(r.get(c, "") for c in HEADER))
        number.append(len(lines))
    with pytest.raises(ManifestError) as e:
        read("\r\n".join(lines))
    assert [r for r, *_ in e.value.problems] == number


text = st.text(st.characters(codec="utf-8"), max_size=12)


@quick
@given(
    st.one_of(
        st.binary(max_size=300),
        st.text(max_size=300),
        st.lists(st.lists(text, max_size=6), max_size=6).map(lambda t: "\n".join(",".join(r) for r in t)),
        st.lists(text, min_size=4, max_size=4).map(lambda r: "slide_id,patient_id,her2_score,uri\n" + ",".join(r)),
    )
)
def test_whatever_the_file_holds_it_is_a_manifest_error_or_a_valid_table(data):
    try:
        df = read(data)
    except ManifestError as e:
        assert str(e).startswith("m.csv: ") and str(e).splitlines()[0].isprintable()
    else:
        assert df["slide_id"].map(lambda s: _RULES["slide_id"](s) == s != "").all() and df["y"].between(0, 3).all()


@quick
@given(text)
def test_no_formula_survives_reading(cell):
    try:
        out = plain_cell(cell)
    except ValueError:
        return
    assert out.isprintable() and out == out.strip()
    if out[:1] in ("=", "@", "+", "-"):
        assert out in "+-" or out.lstrip("+-").replace(".", "").isdigit()


@quick
@given(
    st.lists(
        st.sampled_from(["", "Leica GT450", "a,b", 'say "x"', "a;b", "-", "3", "O'Neill", "caf\u00e9", "\u4e2d"]),
        min_size=8,
        max_size=8,
    )
)
def test_what_is_written_reads_back_the_same(sites):
    df = read(table([{**r, "site": s} for r, s in zip(good_rows(8), sites)]))
    with tempfile.TemporaryDirectory() as d:
        back = read_manifest(write_manifest(df, Path(d) / "m.csv"))
        assert os.listdir(d) == ["m.csv"]
    pd.testing.assert_frame_equal(back, df)


@quick
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
def test_no_written_cell_starts_a_formula(site):
    df = read(table(good_rows(2))).assign(site=site)
    with tempfile.TemporaryDirectory() as d:
        written = write_manifest(df, Path(d) / "m.csv").read_text(encoding="utf-8")
    assert all(r["site"][:1] not in ("=", "+", "-", "@") for r in csv.DictReader(io.StringIO(written, newline="")))


@quick
@given(cohorts())
def test_clam_and_back(case):
    df, n_folds, seed = case
    df = df.assign(slide_id=[f"s{i}" for i in range(len(df))])
    folds = patient_folds(df, n_folds, seed)
    assume(len(set(df["y"])) > 1)
    with tempfile.TemporaryDirectory() as d:
        to_clam(df, folds, d)
        cohort, again = from_clam(Path(d) / "labels.csv", d)
        for k in range(n_folds):
            split = pd.read_csv(Path(d) / f"splits_{k}.csv", index_col=0)
            assert list(split.columns) == ["train", "val", "test"]
            parts = [set(split[c].dropna()) for c in split]
            assert sum(map(len, parts)) == len(set.union(*parts)) == (folds >= 0).sum()
    assert cohort["slide_id"].tolist() == df["slide_id"].tolist() and cohort["y"].tolist() == df["y"].tolist()
    assert (again == folds).all()
    assert cohort["cohort"].tolist() == df["cohort"].tolist(), "external slides come back as main"
    assert (patient_folds(cohort, n_folds, seed) == folds).all()


CLAM = "case_id,slide_id,label\np,a,0\np,b,0\nq,c,3+\nr,d,0\n"


@pytest.mark.parametrize(
    "splits, why",
    [
        (["a,,b", "c,,a"], "splits_0.csv: patient_id p is in train and in test"),
        (["c,a,b"], "splits_0.csv: patient_id p is in val and in test"),
        (["a,b,c"], "splits_0.csv: patient_id p is in train and in val"),
        (["a,a,c"], "splits_0.csv: slide_id a is in train and in val"),
        (["a,c,c"], "splits_0.csv: slide_id c is in val and in test"),
        (["a,c,d", "d,a,c"], "splits_0.csv: slide a is in train and in no split in test"),
        (["a,,c", "c,,a", "c,,b"], "patient p is tested in two splits"),
    ],
)
def test_splits_that_are_no_folds_are_refused(tmp_path, splits, why):
    (tmp_path / "labels.csv").write_text(CLAM)
    for k, s in enumerate(splits):
        (tmp_path / f"splits_{k}.csv").write_text(f",train,val,test\n0,{s}\n")
    with pytest.raises(ManifestError, match=why):
        from_clam(tmp_path / "labels.csv", tmp_path)


def test_whole_numbers_that_pandas_wrote_with_a_point(tmp_path):
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label\np,0,0\nq,1,3+\nr,2,1+\n")
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,2,,0.0\n1,,,1.0\n")
    (tmp_path / "splits_1.csv").write_text(",train,val,test\n0,0,,2.0\n1,1,,\n")
    assert from_clam(tmp_path / "labels.csv", tmp_path)[1].tolist() == [0, 0, 1]


def test_surplus_cells_hide_no_other_problem():
    head = "slide_id,patient_id,her2_score,uri\n"
    with pytest.raises(ManifestError) as e:
        read(head + "a,p,9,../x,surplus\nb,q,0,b.svs,, \n")
    assert [(r, c) for r, c, *_ in e.value.problems] == [(2, "(whole row)"), (2, "her2_score"), (2, "uri")]
    assert read(head + "a,p,0,a.svs,,\nb,q,0,b.svs, \n")["uri"].tolist() == ["a.svs", "b.svs"]


def test_an_external_slide_in_a_split_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label,cohort\np,a,0,\nq,b,0,external\n")
    for k, s in enumerate(["a,,b", "b,,a"]):
        (tmp_path / f"splits_{k}.csv").write_text(f",train,val,test\n0,{s}\n")
    with pytest.raises(ManifestError, match="slide b is external"):
        from_clam(tmp_path / "labels.csv", tmp_path)


def test_links_inside_the_folder_are_followed(tmp_path):
    study, data = tmp_path / "study", tmp_path / "data"
    study.mkdir(), data.mkdir()
    (data / "a.svs").write_bytes(b"pixels")
    (study / "slides").symlink_to(data, target_is_directory=True)
    (study / "m.csv").write_text("slide_id,patient_id,her2_score,uri,roi\na,p,0,slides/a.svs,slides/a.geojson\n")
    df = read_manifest(study / "m.csv")
    assert fetch_slide(df["uri"][0], df.attrs["root"]).resolve() == (data / "a.svs").resolve()
    assert df["roi"][0] == "slides/a.geojson"


@pytest.mark.parametrize(
    "field",
    ["colour=2", "site=Z", "mpp=nan", "mpp=0", "effect=inf", "size=400x-1", "label_noise=1.5", "source_task=none"],
)
def test_a_bad_phantom_is_refused_in_a_sentence_before_it_is_drawn(tmp_path, field):
    df = read("slide_id,patient_id,her2_score,uri\n" + f"a,p,1+,phantom:score=1;seed=1;{field}\n")
    with pytest.raises(SlideError, match=field.split("=")[0]):
        fetch_slide(df["uri"][0], cache=tmp_path)
    assert not [*tmp_path.rglob("*.tif*")]


def test_clam_gets_no_slide_without_a_score_and_no_id_it_would_misread(tmp_path):
    df = read(table(good_rows(16)))
    folds = patient_folds(df, 2)
    to_clam(df.assign(y=df["y"].where(df["slide_id"] != "s3", -1)), folds, tmp_path)
    cohort, again = from_clam(tmp_path / "labels.csv", tmp_path)
    assert (
        cohort["slide_id"].tolist() == [s for s in df["slide_id"] if s != "s3"]
        and again.tolist() == folds[df["slide_id"] != "s3"].tolist()
    )
    for column, bad in (("slide_id", ["17", "007", "NA"]), ("patient_id", ["007", "NA"])):
        for v in bad:
            ids = [v] * len(df) if v.isdigit() and column == "patient_id" else [v, *df[column][1:]]
            with pytest.raises(ManifestError, match=f"such as '{v}'"):
                to_clam(df.assign(**{column: ids}), folds, tmp_path)


H = "slide_id,patient_id,her2_score,uri"
UNAMBIGUOUS = {
    "0.0": "0",
    "3.0": "3+",
    "2,0": "2+",
    "1 +": "1+",
    "+2": "2+",
    "++": "2+",
    "+++": "3+",
    "(++)": "2+",
    "\uff13+": "3+",
    "\uff12": "2+",
    "\u200b2+\ufeff": "2+",
    "2\u200b+": "2+",
    "3+\u00a0": "3+",
    "1\u202f+": "1+",
    "2+ (equivocal)": "2+",
    "2+ Equivocal": "2+",
    "HER2 0": "0",
    "HER-2/neu: 3+": "3+",
    "IHC score 1": "1+",
    "3 plus": "3+",
    "(3+)": "3+",
    "[2+].": "2+",
    "HER2(1+)": "1+",
    "Negative (0)": "0",
    "negative: 1+": "1+",
    "Positive (3+)": "3+",
    "0 / negative": "0",
    "2+, equivocal": "2+",
    "'2+": "2+",
}


@pytest.mark.parametrize("cell, score", UNAMBIGUOUS.items())
def test_what_can_be_one_score_only_is_read(cell, score):
    assert read(f'{H}\ns,p,"{cell}",s.svs\n')["her2_score"].tolist() == [score]


@pytest.mark.parametrize(
    "cell, cure",
    [
        ("+", "score_map={"),
        ("-", "score_map={"),
        ("negative", "score_map={'negative': '0'}"),
        ("low", "score_map={'low': '1+'}"),
        ("0-1+", "names two scores"),
        ("1+/2+", "names two scores"),
        ("2+/FISH-", "column ish"),
        ("2+ ISH positive", "column ish"),
        ("1-Feb", "date"),
        ("02.Mrz", "date"),
        ("2024-02-01", "date"),
        ("2+ (positive)", "allowed are 0"),
        ("2.5", "allowed are 0"),
        ("0 +", "do not separate"),
        ("NA", "require_score=False"),
        ("[Not Available]", "require_score=False"),
    ],
)
def test_what_cannot_is_refused_with_its_cure(cell, cure):
    with pytest.raises(ManifestError, match="row 2, column her2_score") as e:
        read(f'{H}\ns,p,"{cell}",s.svs\n')
    assert cure in str(e.value) and (cell in str(e.value))


@pytest.mark.parametrize(
    "path",
    [
        "/mnt/slides/a.svs",
        "~/a.svs",
        "C:\\slides\\a.svs",
        "d:/a.svs",
        r"\\nas\slides\a.svs",
        "FILE:///mnt/a.svs",
        "../a.svs",
        "x/../../a.svs",
    ],
)
@pytest.mark.parametrize("column", ["uri", "roi", "features"])
def test_a_path_elsewhere_is_refused_with_the_way_to_link_it(path, column):
    row = dict(slide_id="s", patient_id="p", her2_score="0", uri="s.svs") | {column: path}
    with pytest.raises(ManifestError, match="put the slides below the manifest's folder, or link them there") as e:
        read(table([row]))
    assert "slides/a.svs" in str(e.value)


@pytest.mark.parametrize(
    "text, mpp", [("0,2527", 0.2527), ("0.2527", 0.2527), ("2.5E-01", 0.25), ("\uff10.5", 0.5), (".5\u00a0", 0.5)]
)
def test_um_per_px_with_any_decimal_mark(text, mpp):
    assert read(f'{H},mpp\ns,p,0,s.svs,"{text}"\n')["mpp"].tolist() == [mpp]


@pytest.mark.parametrize(
    "text, cure",
    [
        ("40", "magnification"),
        ("250", "nanometres"),
        ("0.25 um/px", "without its unit"),
        ("1,234.5", "allowed is a number"),
    ],
)
def test_um_per_px_that_is_something_else(text, cure):
    with pytest.raises(ManifestError, match=cure):
        read(f'{H},mpp\ns,p,0,s.svs,"{text}"\n')


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_encodings_that_say_what_they_are(encoding, end, sep):
    rows = [H.split(","), ["s", "p", "3+", "Gr\u00f6\u00dfe.svs"], [""] * 4, ["t", "q", "0", "t.svs"]]
    df = read((end.join(sep.join(r) for r in rows) + end).encode(encoding))
    assert df["uri"].tolist() == ["Gr\u00f6\u00dfe.svs", "t.svs"] and df["her2_score"].tolist() == ["3+", "0"]


@pytest.mark.parametrize(
    "data",
    [
        "\xe4".encode("latin-1"),
        (H + "\n").encode("utf-16-le"),
        b"PK\x03\x04",
        (H + "\n").encode("utf-32"),
        b"\xd0\xcf\x11\xe0",
        (H + "\na").encode("utf-16")[:-1],
    ],
)
def test_encodings_that_do_not_are_refused_with_the_cure(data):
    with pytest.raises(ManifestError, match="CSV UTF-8"):
        read(data)


def test_a_missing_manifest_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ManifestError, match="No such file") as e:
        read_manifest("m.csv")
    assert str(tmp_path) in str(e.value)


def test_new_columns_are_checked_and_written_back(tmp_path):
    (tmp_path / "m.csv").write_text(
        f"{H},md5,features,roi,roi_classes,roi_origin\n"
        f's,p,0,https://host/s.svs,{"AB" * 16},,s.geojson.gz," Tumor ; In situ;",Slide\nt,q,1+,,,bags/t.h5,,,\n'
    )
    df = read_manifest(tmp_path / "m.csv")
    assert df["md5"].tolist() == ["ab" * 16, ""] and df["features"].tolist() == ["", "bags/t.h5"]
    assert df["roi_classes"].tolist() == ["Tumor;In situ", ""] and df["roi_origin"].tolist() == ["slide", "scanned"]
    pd.testing.assert_frame_equal(read_manifest(write_manifest(df, tmp_path / "copy.csv")), df)
    with pytest.raises(ManifestError, match="or an md5"):
        read(f"{H}\ns,p,0,https://host/s.svs\n")
    with pytest.raises(ManifestError, match="computed bag"):
        read(f"{H},features\ns,p,0,,\n")


def test_clam_tables_as_pandas_and_process_lists_write_them(tmp_path):
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label\n7.0,a.svs,0\n8,b.ndpi,3.0\n9.0,c,1\n")
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,c,,a.svs\n1,,,b.ndpi\n")
    (tmp_path / "splits_1.csv").write_text(",train,val,test\n0,a,,c\n1,b,,\n")
    df, folds = from_clam(tmp_path / "labels.csv", tmp_path, uri="slides/{slide_id}.svs")
    assert df["slide_id"].tolist() == ["a", "b", "c"] and df["uri"].tolist() == [
        "slides/a.svs",
        "slides/b.ndpi",
        "slides/c.svs",
    ]
    assert df["patient_id"].tolist() == ["7", "8", "9"] and folds.tolist() == [0, 0, 1]
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label\np,a.svs,0\nq,a.ndpi,3+\n")
    with pytest.raises(ManifestError, match="already in row 2"):
        from_clam(tmp_path / "labels.csv")
    from her2_mil import cohort

    assert cohort.from_clam is from_clam and not hasattr(cohort, "nothing")


def tcga(real):
    "The slides of TCGA-BRCA with a HER2 score: patient and hospital from the barcode"
    clinical = pd.read_csv(
        real / "tcga_brca" / "nationwidechildrens.org_clinical_patient_brca.txt", sep="\t", skiprows=[1, 2]
    ).set_index("bcr_patient_barcode")
    names = sorted(p.stem for p in (real / "tcga_brca" / "hipt_vit256mean").glob("*.pt"))
    df = pd.DataFrame(
        dict(slide_id=names, patient_id=[n[:12] for n in names], site=[n[5:7] for n in names], cohort="main")
    )
    df["her2_score"] = df["patient_id"].map(clinical["her2_ihc_score"])
    return df[df["her2_score"].isin(SCORES)].reset_index(drop=True)


def test_28_real_hospitals_of_very_different_size(real):
    if not (real / "tcga_brca").is_dir():
        pytest.skip("no TCGA-BRCA among the real data")
    df = tcga(real)
    assert (len(df), df["patient_id"].nunique(), df["site"].nunique()) == (572, 544, 28)
    for n_folds in (2, 3, 5, 7):
        fold = patient_folds(df, n_folds, by_site=True)
        assert pd.Series(fold).groupby(df["site"]).nunique().eq(1).all()
        people = df.assign(fold=fold).drop_duplicates("patient_id")
        counts = pd.crosstab(people["fold"], people["her2_score"])
        assert (counts > 0).all(axis=None)
        if n_folds <= 5:
            assert (counts.sum(axis=1) > 0.7 * len(people) / n_folds).all(), "a fold is much smaller than the others"
    with pytest.raises(ManifestError, match="take at most 7 folds, because 0 was seen in 7 only"):
        patient_folds(df, 8, by_site=True)


def test_splits_that_a_spreadsheet_saved_are_read_too(tmp_path):
    (tmp_path / "labels.csv").write_text("case_id;slide_id;label\np;a;0\nq;b;3+\n")
    for k, ids in enumerate(["b;;a", "a;;b"]):
        (tmp_path / f"splits_{k}.csv").write_bytes(f";train;val;test\r\n0;{ids}\r\n".encode("utf-16"))
    assert from_clam(tmp_path / "labels.csv", tmp_path)[1].tolist() == [0, 1]


def test_a_table_made_in_pandas_is_checked_as_a_file_is(tmp_path):
    df = pd.DataFrame(dict(slide_id=["a", "b"], patient_id=[7, 8], her2_score=[3.0, np.nan], uri=["a.svs", None]))
    df.attrs = dict(root=str(tmp_path), other=df.copy())  # whatever else a table carries along
    with pytest.raises(ManifestError) as e:
        check_manifest(df)
    assert [(r, c) for r, c, *_ in e.value.problems] == [(3, "her2_score"), (3, "uri")]
    found = check_manifest(df.assign(uri="a.svs", features=["", "b.h5"])[:1])
    assert found["patient_id"].tolist() == ["7"] and found["y"].tolist() == [3]
    assert found.attrs == dict(root=str(tmp_path.resolve()), ignored=[])
