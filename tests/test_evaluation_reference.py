"""Every estimator of chapter 11 against slow, plain or foreign implementations, on input found by hypothesis."""

import ast
import warnings
from io import StringIO

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import (
    average_precision_score,
    cohen_kappa_score,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    roc_auc_score,
)
from statsmodels.stats.proportion import proportion_confint

from conftest import ROOT
from her2_mil import clinical, comparison, evaluation as ev, intervals
from her2_mil.training import _permute

scores = st.lists(st.integers(0, 6), min_size=2, max_size=12)
LOGITS = [f"logit{c}" for c in range(4)]
quick = settings(max_examples=25, deadline=None)


def brute(pos, neg):
    "AUC and DeLong's standard error by double loops"
    psi = [[1.0 if a > b else 0.5 if a == b else 0.0 for b in neg] for a in pos]
    m, k = len(pos), len(neg)
    auc = sum(map(sum, psi)) / (m * k)
    v10 = [sum(r) / k for r in psi]
    v01 = [sum(psi[i][j] for i in range(m)) / m for j in range(k)]
    s10, s01 = (sum((v - auc) ** 2 for v in vs) / (len(vs) - 1) for vs in (v10, v01))
    return auc, (s10 / m + s01 / k) ** 0.5


def table(logits, y, fold, patient=None, **kw):
    n = len(y)
    return pd.DataFrame(
        dict(
            arm="a",
            pretrain_seed=0,
            seed=0,
            repeat=0,
            fold=fold,
            split="test",
            slide_id=[f"s{i}" for i in range(n)],
            patient_id=[f"p{i}" for i in range(n)] if patient is None else patient,
            y=y,
            **{f"logit{c}": logits[:, c] for c in range(4)},
        )
    ).assign(**kw)


@quick
@given(scores, scores)
def test_auc_and_standard_error_against_double_loops(pos, neg):
    s = intervals.summarise(np.array(pos, float)[None], np.array(neg, float)[None])
    auc, se = brute(pos, neg)
    assert s.auc[0] == pytest.approx(auc, abs=1e-6) and s.se[0] == pytest.approx(se, abs=1e-6)
    v, _, _ = intervals.placements(
        np.r_[pos, neg], np.r_[np.ones(len(pos)), np.zeros(len(neg))] > 0, np.zeros(len(pos) + len(neg), int)
    )
    assert v[: len(pos)].mean() == pytest.approx(auc)


@quick
@given(scores, scores, st.sampled_from(list(intervals.METHODS)))
def test_every_interval_lies_in_0_to_1_and_turns_round_with_the_labels(pos, neg, method):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, s = np.r_[np.ones(len(pos)), np.zeros(len(neg))], np.r_[pos, neg].astype(float)
        a, b = ev.auc_interval(y, s, method, n_boot=200), ev.auc_interval(1 - y, s, method, n_boot=200)
    assert 0 <= a.low <= a.high <= 1
    assert a.auc == pytest.approx(1 - b.auc, abs=1e-6)
    if method not in intervals.BOOTSTRAPS:
        assert a.low == pytest.approx(1 - b.high, abs=1e-6) and a.low - 1e-9 <= a.auc <= a.high + 1e-9


@quick
@given(st.integers(0, 10**6))
def test_delong_test_against_covariance_by_hand(seed):
    rng = np.random.default_rng(seed)
    y, a = np.arange(24) % 3 == 0, rng.integers(0, 8, 24)
    b = a + rng.integers(-3, 4, 24)
    psi = [np.array([[1.0 if p > q else 0.5 if p == q else 0.0 for q in s[~y]] for p in s[y]]) for s in (a, b)]
    cov = np.cov([p.mean(1) for p in psi]) / y.sum() + np.cov([p.mean(0) for p in psi]) / (~y).sum()
    var, r = cov[0, 0] + cov[1, 1] - 2 * cov[0, 1], ev.delong_test(y, a, b)
    assert r.se == pytest.approx(np.sqrt(max(var, 0)), abs=1e-7)
    if var > 1e-12:
        assert r.p == pytest.approx(2 * stats.norm.sf(abs(psi[0].mean() - psi[1].mean()) / np.sqrt(var)))


@quick
@given(st.integers(0, 10**6), st.sets(st.integers(0, 3), min_size=1), st.integers(1, 4))
def test_auc_table_is_sklearn_or_nan_whatever_scores_are_missing(seed, present, n_folds):
    rng = np.random.default_rng(seed)
    y, fold, logits = (
        rng.choice(sorted(present), 40),
        rng.integers(0, n_folds, 40),
        np.round(rng.normal(size=(40, 4)), 1),
    )
    r = ev.auc_table(table(logits, y, fold)).query("estimand == 'within folds'").set_index("score")
    p, each = softmax(logits, axis=1), []
    for c in range(4):
        cells = [
            roc_auc_score(y[fold == f] == c, p[fold == f, c])
            for f in np.unique(fold)
            if 0 < (y[fold == f] == c).sum() < (fold == f).sum()
        ]
        each.append(np.mean(cells) if cells else np.nan)
        assert r.auc[ev.SCORES[c]] == pytest.approx(each[-1], nan_ok=True)
        assert r.undefined[ev.SCORES[c]] == len(np.unique(fold)) - len(cells)
        if cells:
            assert (
                0 <= r.low[ev.SCORES[c]] <= r.auc[ev.SCORES[c]] + 1e-9
                and r.auc[ev.SCORES[c]] - 1e-9 <= r.high[ev.SCORES[c]] <= 1
            )
    assert r.auc["macro"] == pytest.approx(np.mean(each), nan_ok=True)


def test_mean_logits_of_several_slides():
    rng = np.random.default_rng(0)
    y, logits = np.repeat(np.arange(20) % 4, 2), rng.normal(size=(40, 4))
    both = table(logits, y, 0, patient=[f"p{i // 2}" for i in range(40)])
    mean = table(logits.reshape(20, 2, 4).mean(1), y[::2], 0)
    cols = ["auc", "low", "high", "n_patients"]
    pd.testing.assert_frame_equal(ev.auc_table(both)[cols], ev.auc_table(mean)[cols])


def test_interval_agrees_with_a_bootstrap_of_patients_over_repeats_and_seeds():
    rng = np.random.default_rng(1)
    n, y = 80, np.arange(80) % 4
    latent, parts = np.eye(4)[y] + rng.normal(size=(n, 4)), []
    for seed in range(3):
        parts.append(table(latent + 0.5 * rng.normal(size=(n, 4)), y, rng.permutation(n // 4 * 4) % 4, seed=seed))
    t = pd.concat(parts, ignore_index=True)
    row, drawn = ev.auc_table(t).query("estimand == 'pooled' and score == 'macro'").iloc[0], []
    p = [softmax(q[LOGITS].to_numpy(), axis=1) for q in parts]
    for _ in range(400):
        i = np.concatenate([rng.choice(np.flatnonzero(y == c), 20) for c in range(4)])
        drawn.append(np.mean([roc_auc_score(y[i] == c, q[i, c]) for q in p for c in range(4)]))
    assert row.se == pytest.approx(np.std(drawn), rel=0.15)


@quick
@given(st.integers(0, 10**6))
def test_weighted_metrics_equal_repeating_patients(seed):
    rng = np.random.default_rng(seed)
    y, fold, logits, w = (
        np.arange(24) % 4,
        np.arange(24) // 12,
        np.round(rng.normal(size=(24, 4)), 1),
        rng.integers(0, 3, 24),
    )
    w[:4], w[12:16] = 1, 1
    t = ev.patient_table(table(logits, y, fold))
    order = t.patient_id.str[1:].astype(int).to_numpy()
    ours, i = clinical._ordinal(t, w[order][None].astype(float)), np.repeat(np.arange(24), w)
    p = softmax(logits, axis=1)
    assert ours["quadratic-weighted kappa"][0] == pytest.approx(
        cohen_kappa_score(y[i], p[i].argmax(1), weights="quadratic", labels=range(4))
    )
    e = p @ np.arange(4)
    d = [stats.somersd(y[i][fold[i] == f], e[i][fold[i] == f]).statistic for f in (0, 1)]
    assert ours["Somers' D"][0] == pytest.approx(np.mean(d))
    if (y[i] == 3).any():
        assert clinical._average_precision(y == 3, p[:, 3], w[None])[0] == pytest.approx(
            average_precision_score(y[i] == 3, p[i, 3])
        )


def test_corrected_variance_of_nadeau_and_bengio_by_hand():
    d = np.array([0.02, 0.05, -0.01, 0.04, 0.03, 0.06, 0.0, 0.02, 0.05, 0.01])
    t = d.mean() / np.sqrt((1 / 10 + 20 / 80) * d.var(ddof=1))
    r = comparison.corrected_test(d, [], 20 / 80, 0.95)
    assert r["t"] == pytest.approx(t) and r["p"] == pytest.approx(2 * stats.t.sf(t, 9))


def test_random_effect_follows_welch_where_only_seeds_vary():
    a, b = np.array([0.6, 0.62, 0.58, 0.65, 0.61]), np.array([0.55, 0.5, 0.59, 0.52, 0.57])
    r, w = (
        comparison.corrected_test(np.full(10, a.mean() - b.mean()), [a, b], 0.25, 0.95),
        stats.ttest_ind(a, b, equal_var=False),
    )
    assert r["t"] == pytest.approx(w.statistic) and r["p"] == pytest.approx(w.pvalue) and r["df"] == pytest.approx(w.df)


def test_one_patient_and_constant_predictions():
    one = ev.auc_table(table(np.zeros((1, 4)), np.array([2]), 0))
    assert one.auc.isna().all() and one.low.isna().all()
    flat = ev.auc_table(table(np.zeros((40, 4)), np.arange(40) % 4, np.arange(40) // 8)).query("primary").iloc[0]
    assert flat.auc == 0.5 and flat.low < 0.5 < flat.high
    m = ev.ordinal_metrics(table(np.zeros((40, 4)), np.arange(40) % 4, 0), n_boot=20).set_index("metric").value
    assert m["balanced accuracy"] == 0.25 and m["Somers' D"] == 0


# --- intervals and tables against other implementations


@pytest.mark.parametrize("method, theirs", [("percentile", "percentile"), ("bca", "BCa")])
def test_bootstrap_intervals_against_scipy(method, theirs):
    rng = np.random.default_rng(5)
    pos, neg = rng.normal(1, 1.5, 30), rng.normal(size=45)
    auc = lambda p, n, axis=-1: (p[..., :, None] > n[..., None, :]).mean((-1, -2))
    r = stats.bootstrap(
        (pos, neg), auc, method=theirs, n_resamples=4000, rng=np.random.default_rng(0), vectorized=True, batch=500
    ).confidence_interval
    ours = ev.auc_interval(np.r_[np.ones(30), np.zeros(45)], np.r_[pos, neg], method, n_boot=4000)
    assert [ours.low, ours.high] == pytest.approx([r.low, r.high], abs=0.012)


def test_logit_bootstrap_is_the_spread_of_scipys_resamples():
    rng = np.random.default_rng(6)
    pos, neg = rng.normal(1, 1, 30), rng.normal(size=45)
    auc = lambda p, n, axis=-1: (p[..., :, None] > n[..., None, :]).mean((-1, -2))
    drawn = stats.bootstrap(
        (pos, neg), auc, method="percentile", n_resamples=4000, rng=np.random.default_rng(0), vectorized=True, batch=500
    ).bootstrap_distribution
    logit = lambda x: np.log(x / (1 - x))
    half, centre = 1.959964 * logit(np.clip(drawn, 0.5 / 1350, 1 - 0.5 / 1350)).std(ddof=1), logit(auc(pos, neg))
    ours = ev.auc_interval(np.r_[np.ones(30), np.zeros(45)], np.r_[pos, neg], "logit bootstrap", n_boot=4000)
    assert [logit(ours.low), logit(ours.high)] == pytest.approx([centre - half, centre + half], abs=0.08)


def defined(notebook):
    "Imports and functions of a notebook that exports nothing"
    names = {}
    for cell in nbformat.read(ROOT / "nbs" / notebook, 4).cells:
        if (
            cell.cell_type == "code"
            and cell.source.startswith(("from ", "import ", "def "))
            and "#|" not in cell.source
        ):
            tree = ast.parse(cell.source)
            tree.body = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
            exec(compile(tree, notebook, "exec"), names)
    return names


def test_committed_coverage_is_what_its_cell_writes():
    "Random rows of data/coverage.csv, recomputed with the same seed, digit for digit"
    there = pd.read_csv(ROOT / "nbs" / "data" / "coverage.csv")
    coverage_rows = defined("supplement/coverage.ipynb")["coverage_rows"]
    cells = there[["n", "prevalence", "auc", "spread"]].drop_duplicates()
    assert (
        len(cells) == 160
        and (there.groupby(list(cells)).size() == len(intervals.METHODS)).all()
        and (there.cohorts >= 1000).all()
    )
    for c in [
        *cells.query("n <= 40").sample(5, random_state=1).itertuples(),
        *cells.query("n == 100").sample(1, random_state=1).itertuples(),
    ]:
        ours = pd.read_csv(
            StringIO(coverage_rows(c.n, c.prevalence, c.auc, c.spread, cohorts=2000).round(4).to_csv(index=False))
        )
        same = there.query(
            f"n == {c.n} and prevalence == {c.prevalence} and auc == {c.auc} and spread == {c.spread}"
        ).reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, same, check_exact=True)


@pytest.mark.parametrize("name", ["coverage", "macro", "trained", "type1", "chance", "within"])
def test_every_committed_simulation_has_a_thousand_cohorts(name):
    t = pd.read_csv(ROOT / "nbs" / "data" / f"{name}.csv")
    assert (t.cohorts >= 1000).all() and set(t.run) == {name} and t.seed.notna().all()


@quick
@given(st.integers(0, 10**6))
def test_family_wise_p_against_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    obs, null = rng.normal(0.2, 1, 4) * [1, 1, 2, 5], rng.normal(size=(30, 4)) * [1, 1, 2, 5]
    p, family = comparison.permutation_p(obs, null)
    rows = [list(obs), *map(list, null)]
    mean, sd = [np.mean([r[k] for r in rows]) for k in range(4)], [np.std([r[k] for r in rows]) for k in range(4)]
    top = [max((r[k] - mean[k]) / sd[k] for k in range(4)) for r in rows]
    for k in range(4):
        assert p[k] == pytest.approx((1 + sum(r[k] >= obs[k] for r in null)) / 31)
        assert family[k] == pytest.approx(sum(t >= (obs[k] - mean[k]) / sd[k] - 1e-9 for t in top) / 31)
        assert family[k] >= p[k] - 1e-12


@quick
@given(st.integers(0, 10**6))
def test_scores_and_calibration_against_sklearn_and_plain_loops(seed):
    rng = np.random.default_rng(seed)
    y, logits = np.arange(40) % 4, rng.normal(size=(40, 4))
    t = table(logits, y, np.arange(40) // 8)
    p = softmax(logits, axis=1)
    e, call = p @ np.arange(4), p.argmax(1)
    m = ev.ordinal_metrics(t, n_boot=5).set_index("metric").value
    assert m["MAE (argmax)"] == pytest.approx(mean_absolute_error(y, call)) and m[
        "MAE (expected score)"
    ] == pytest.approx(mean_absolute_error(y, e))
    assert m["adjacent accuracy (argmax)"] == pytest.approx(np.mean([abs(a - b) <= 1 for a, b in zip(y, call)]))
    assert m["adjacent accuracy (expected score)"] == pytest.approx(
        np.mean([abs(a - round(b)) <= 1 for a, b in zip(y, e)])
    )
    c = ev.calibration(t, n_null=5).iloc[0]
    assert c.brier == pytest.approx(sum(mean_squared_error(y == k, p[:, k]) for k in range(4)))
    gap = 0
    for b in range(10):
        i = [j for j in range(40) if b / 10 <= p[j].max() < (b + 1) / 10]
        if i:
            gap += len(i) / 40 * abs(np.mean([call[j] == y[j] for j in i]) - np.mean([p[j].max() for j in i]))
    assert c.ece == pytest.approx(gap)


def test_temperature_against_a_grid():
    rng = np.random.default_rng(2)
    y, logits = np.arange(80) % 4, 3 * rng.normal(size=(80, 4))
    logits[np.arange(80), y] += 2
    grid = np.geomspace(0.05, 20, 4000)
    loss = [log_loss(y, softmax(logits / g, axis=1)) for g in grid]
    assert clinical._temperature(logits, y) == pytest.approx(grid[np.argmin(loss)], rel=0.01)


def test_risk_coverage_by_sorting():
    rng = np.random.default_rng(3)
    y, logits = np.arange(40) % 4, rng.normal(size=(40, 4))
    p = softmax(logits, axis=1)
    order = sorted(range(40), key=lambda i: -p[i].max())
    for r in ev.risk_coverage(table(logits, y, 0), n_boot=5).itertuples():
        surest = order[: int(np.ceil(r.coverage * 40 - 1e-9))]
        assert r.risk == pytest.approx(np.mean([p[i].argmax() != y[i] for i in surest]))


def test_stains_spared_against_bayes_and_statsmodels():
    y = np.r_[np.full(20, 3), np.arange(60) % 3]
    low3 = np.r_[
        np.arange(20) < 5, np.arange(60) < 40
    ]  # p(3+) below the threshold: 5 of 20 positives, 40 of 60 negatives
    logits = np.zeros((80, 4))
    logits[:, 3] = np.where(low3, -9, 9)
    r = ev.stains_spared(table(logits, y, 0), 0.2, thresholds=(0.5,), draws=200_000).iloc[0]
    assert (r.sensitivity, r.specificity) == (0.75, pytest.approx(2 / 3))
    assert r.npv == pytest.approx(2 / 3 * 0.8 / (2 / 3 * 0.8 + 0.25 * 0.2)) and r.spared == pytest.approx(
        1000 * (0.25 * 0.2 + 2 / 3 * 0.8)
    )
    assert [r.missed_low / 200, r.missed_high / 200] == pytest.approx(
        proportion_confint(5, 20, method="jeffreys"), abs=0.003
    )


# --- input from which nothing, or little, can be known


def degenerate():
    y = np.arange(40) % 4
    five, wrong = np.arange(40) // 8, np.where(y == 3, 1 + np.arange(40) // 4 % 4, np.arange(40) // 4 % 5)
    noise = np.random.default_rng(0).normal(size=(40, 4))
    yield "one patient", table(noise[:1], np.array([2]), 0)
    yield "two patients", table(noise[:2], np.array([2, 3]), 0)
    yield "one score", table(noise[:12], np.full(12, 1), np.arange(12) % 3)
    yield "no 3+", table(noise[:30], np.arange(30) % 3, np.arange(30) // 3 % 5)
    yield "3+ missing in a fold", table(noise, y, wrong)
    yield "one patient a fold", table(noise[:8], np.arange(8) % 4, np.arange(8))
    yield "constant", table(np.zeros((40, 4)), y, five)
    yield "separated", table(50.0 * np.eye(4)[y], y, five)
    yield "huge", table(1e300 * np.eye(4)[y], y, five)
    yield "NaN", table(np.full((40, 4), np.nan), y, five)
    yield "infinite", table(np.full((40, 4), np.inf), y, five)
    yield "no score", table(noise, y, five).assign(y=np.nan)
    yield "no patient", table(noise, y, five).assign(patient_id=None)
    yield "no fold", table(noise, y, five).assign(fold=np.nan)
    yield "empty", table(noise, y, five)[:0]


def two(t):
    return pd.concat([t, t.assign(arm="b")])


REFUSED = {"NaN", "infinite", "no score", "no patient", "no fold", "empty"}
FUNCTIONS = dict(
    auc_table=ev.auc_table,
    by_site=lambda t: ev.auc_table(t, by="site"),
    auc_within=ev.auc_within,
    endpoint_table=lambda t: ev.endpoint_table(t, n_boot=20),
    ordinal_metrics=lambda t: ev.ordinal_metrics(t, n_boot=20),
    calibration=lambda t: ev.calibration(t, n_null=20),
    risk_coverage=lambda t: ev.risk_coverage(t, n_boot=20),
    stains_spared=lambda t: ev.stains_spared(t, 0.1),
    confounding=ev.confounding,
    failure_signatures=ev.failure_signatures,
    compare_arms=lambda t: ev.compare_arms(two(t)),
    compare_cohorts=lambda t: ev.compare_cohorts([two(t)] * 3),
    permutation_test=lambda t: ev.permutation_test(t, [t] * 5),
    plot_roc=lambda t: ev.plot_roc(ev.roc_curves(t, n_boot=20)),
    plot_confusion=lambda t: ev.plot_confusion(ev.confusion_table(t)),
    plot_scores=lambda t: ev.plot_scores(ev.expected_scores(t)),
    plot_reliability=lambda t: ev.plot_reliability(ev.reliability_table(t)),
)
BOUNDED = [
    "auc",
    "low",
    "high",
    "pr_auc",
    "risk",
    "sensitivity",
    "specificity",
    "npv",
    "npv_low",
    "npv_high",
    "p",
    "p_holm",
    "p_family",
    "ece",
    "ece_p",
    "observed",
]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("what, t", list(degenerate()), ids=[w for w, _ in degenerate()])
@pytest.mark.filterwarnings("error")
def test_degenerate_input_gives_a_sentence_or_nan_never_a_wrong_number(name, what, t):
    plt.switch_backend("Agg")
    try:
        r = FUNCTIONS[name](
            t.assign(site=np.where(np.arange(len(t)) // 4 % 2, "x", "z"), n_patches=10, attention_entropy=2.0)
        )
    except ev.EvaluationError as e:
        assert len(str(e)) > 20 and (what in REFUSED or name in ("compare_arms", "compare_cohorts", "permutation_test"))
        return
    finally:
        plt.close("all")
    assert what not in REFUSED
    if isinstance(r, pd.DataFrame) and name not in (
        "compare_arms",
        "compare_cohorts",
        "ordinal_metrics",
        "failure_signatures",
    ):
        for c in set(BOUNDED) & set(r):
            assert r[c].dropna().between(0, 1).all(), (c, r[c])
    if {"low", "high"} <= set(getattr(r, "columns", [])):  # no interval pretends to know everything
        known = r.dropna(subset=["low", "high"])
        assert (known.low < known.high).all()


def test_identical_or_constant_arms_have_no_interval():
    y, a = np.arange(40) % 4, np.random.default_rng(0).normal(size=40)
    assert np.isnan(ev.delong_test(y == 3, a, a).low) and ev.delong_test(y == 3, a, a).p == 1
    r = comparison.corrected_test(np.full(5, 0.1), [], 0.25, 0.95)
    assert np.isnan([r["low"], r["high"], r["p"]]).all()


# --- patients of the same site, other classes, chance


@quick
@given(st.integers(0, 10**6))
def test_auc_within_sites_against_a_double_loop(seed):
    rng = np.random.default_rng(seed)
    n, parts = 30, []
    y, site = rng.integers(0, 4, n), rng.choice(["x", "z", "w", ""], n)
    for repeat in range(2):
        parts.append(table(np.round(rng.normal(size=(n, 4)), 1), y, rng.integers(0, 3, n), repeat=repeat, site=site))
    t = pd.concat(parts, ignore_index=True)
    for estimand, r in ev.auc_within(t).groupby("estimand"):
        r, each = r.set_index("score"), []
        for c in range(4):
            right, pairs, seen, groups = 0.0, set(), 0, set()
            for q in parts:
                p = softmax(q[LOGITS].to_numpy(), axis=1)[:, c]
                for i in range(n):
                    for j in range(n):
                        same = site[i] == site[j] != "" and (estimand == "pooled" or q.fold[i] == q.fold[j])
                        if same and y[i] == c != y[j]:
                            right += 1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0
                            seen += 1
                            pairs.add((i, j))
                            groups.add(site[i])
            each.append(right / seen if seen else np.nan)
            row = r.loc[ev.SCORES[c]]
            assert row.auc == pytest.approx(each[-1], nan_ok=True)
            assert (row.n_pairs, row.n_groups, row.n_patients) == (
                len(pairs),
                len(groups),
                len({i for p in pairs for i in p}),
            )
            assert row.n_left_out == (site == "").sum()
            if seen:
                assert row.low <= row.auc + 1e-9 and row.auc - 1e-9 <= row.high and row.low < row.high
        assert r.auc["macro"] == pytest.approx(np.mean(each), nan_ok=True)
        assert 2 * r.n_pairs["macro"] == r.n_pairs[list(ev.SCORES)].sum()


def test_a_model_that_sees_only_the_site_is_at_chance_within_sites():
    rng = np.random.default_rng(0)
    site = rng.integers(0, 8, 400)
    y = (site + rng.integers(0, 2, 400)) // 2 % 4
    logits = np.log(np.eye(4)[site // 2] + 0.1)
    t = table(logits, y, np.arange(400) % 5, site=site.astype(str))
    assert ev.auc_table(t).query("primary").auc.item() > 0.7
    assert np.allclose(ev.auc_within(t).auc, 0.5)


@pytest.mark.parametrize("classes", [("negative", "positive"), ("a", "b", "c"), tuple("abcde")], ids=len)
def test_any_number_of_classes(classes):
    rng, k, n = np.random.default_rng(1), len(classes), 60
    y = np.arange(n) % k
    t = table(
        rng.normal(size=(n, max(k, 4))) + 2 * np.eye(max(k, 4))[y],
        y,
        np.arange(n) // k % 3,
        site=np.where(np.arange(n) < 30, "x", "z"),
    )
    t = t.drop(columns=[f"logit{c}" for c in range(k, 4)]).assign(
        **{f"logit{c}": rng.normal(size=n) + 2 * (y == c) for c in range(4, k)}
    )
    p = softmax(t[[f"logit{c}" for c in range(k)]].to_numpy(), axis=1)
    each = [np.mean([roc_auc_score(y[t.fold == f] == c, p[t.fold == f, c]) for f in range(3)]) for c in range(k)]
    r = ev.auc_table(t, classes=classes).query("estimand == 'within folds'").set_index("score")
    assert (
        list(r.index) == ["macro", *classes]
        and r.auc[list(classes)].tolist() == pytest.approx(each)
        and r.auc["macro"] == pytest.approx(np.mean(each))
    )
    permuted = ev.permutation_test(t, [t.assign(y=rng.permutation(y)) for _ in range(5)], classes=classes)
    assert permuted.observed.tolist() == pytest.approx(r.auc.tolist()) and permuted.score.tolist() == [
        "macro",
        *classes,
    ]
    assert len(ev.auc_within(t, classes=classes)) == 2 * (k + 1)
    assert ev.calibration(t, classes=classes, n_null=5)[[f"slope {c}" for c in classes]].shape == (1, k)
    assert ev.ordinal_metrics(t, classes=classes, n_boot=5).set_index("metric").value[
        "quadratic-weighted kappa"
    ] == pytest.approx(cohen_kappa_score(y, p.argmax(1), weights="quadratic", labels=range(k)))
    nuisance = ev.nuisance_auc(pd.DataFrame(dict(leak=y + rng.normal(size=n))), y, t.fold, t.patient_id, classes)
    assert len(nuisance) == 4 * (k + 1) and nuisance[["auc", "se", "low", "high"]].notna().all(axis=None)
    assert isinstance(ev.failure_signatures(t, nuisance, classes), pd.DataFrame)
    ev.compare_arms(two(t), classes=classes)
    plt.switch_backend("Agg")
    ev.plot_roc(ev.roc_curves(t, n_boot=5, classes=classes))
    ev.plot_confusion(ev.confusion_table(t, classes=classes))
    ev.plot_scores(ev.expected_scores(t, classes=classes), classes)
    ev.plot_reliability(ev.reliability_table(t, classes=classes))
    plt.close("all")


@pytest.mark.parametrize(
    "classes, says",
    [
        (("a", "b"), "4 columns of logits for 2 classes"),
        (tuple("abcde"), "no column logit4"),
        ("abcd", "give two or more different names"),
        (("a", "a", "b", "c"), "different names"),
        (("macro", "a", "b", "c"), "none of them 'macro'"),
    ],
)
def test_classes_that_do_not_fit_the_table_are_refused(classes, says):
    with pytest.raises(ev.EvaluationError, match=says):
        ev.auc_table(table(np.zeros((8, 4)), np.arange(8) % 4, 0), classes=classes)


@pytest.mark.parametrize("column", ["folds_by", "variant"])
def test_an_arm_that_is_two_things_is_refused(column):
    t = table(
        np.random.default_rng(0).normal(size=(40, 4)),
        np.arange(40) % 4,
        0,
        **{column: np.repeat(["patient", "site"], 20)},
    )
    with pytest.raises(ev.EvaluationError, match="one at a time: predictions.query"):
        ev.auc_table(t)
    ev.auc_table(t.assign(arm=t[column]))


def test_permutation_table_holds_the_quantiles_of_its_null_and_takes_one_long_table():
    rng = np.random.default_rng(3)
    t = table(rng.normal(size=(40, 4)), np.arange(40) % 4, np.arange(40) // 8)
    null = [t.assign(y=rng.permutation(t.y), run=f"r{i:03d}") for i in range(30)]
    r = ev.permutation_test(two(t), [two(x) for x in null])
    macro = [ev.auc_table(x).query("primary").auc.item() for x in null]
    row = r[(r.arm == "a") & (r.score == "macro")].iloc[0]
    assert row[["null_low", "null_median", "null_95", "null_high"]].tolist() == pytest.approx(
        np.quantile(macro, [0.025, 0.5, 0.95, 0.975]).tolist()
    )
    assert (row.n_permutations, row.p) == (30, pytest.approx((1 + sum(m >= row.observed - 1e-12 for m in macro)) / 31))
    pd.testing.assert_frame_equal(r, ev.permutation_test(two(t), two(pd.concat(null, ignore_index=True))))


def test_a_baseline_as_good_as_the_model_is_listed_whatever_its_standard_error():
    "Once only baselines 2.58 standard errors above 0.5 were: a cohort so small that nothing is passed in silence"
    rng = np.random.default_rng(4)
    n, y = 40, np.arange(40) % 4
    t = table(rng.normal(size=(n, 4)), y, np.arange(n) // 4 % 5)
    nuisance = ev.nuisance_auc(
        pd.DataFrame(dict(size=y + 3 * rng.normal(size=n), order=rng.normal(size=n))), y, t.fold, t.patient_id
    )
    own, base = ev.auc_table(t).query("primary").iloc[0], nuisance.query("primary").set_index("arm")
    r = ev.rivals(nuisance, ev.auc_table(t))
    assert (
        set(r.baseline) == set(base.index[base.auc >= own.low]) != set() and (r.baseline_z < ev.STANDARD_ERRORS).any()
    )
    assert r.baseline_se.tolist() == base.se[r.baseline].tolist() and r.baseline_auc.is_monotonic_decreasing
    remedy = ev.failure_signatures(t, nuisance).set_index("signature").remedy["nuisance baseline as good as the model"]
    assert all(f"{b} {base.auc[b]:.2f} (standard error {base.se[b]:.2f})" in remedy for b in r.baseline)


@pytest.mark.parametrize("name", ["A", "mean pooling", "not mean pooling at all"])
def test_no_name_hides_flat_attention(name):
    rng = np.random.default_rng(5)
    t = table(rng.normal(size=(40, 4)), np.arange(40) % 4, np.arange(40) // 8, arm=name, n_patches=100)
    flat = ev.failure_signatures(t.assign(attention_entropy=np.log(100) * rng.uniform(0.985, 0.9999, 40)))
    equal = ev.failure_signatures(t.assign(attention_entropy=np.log(100)))
    assert "attention all similar" in set(flat.signature) and "attention all similar" not in set(equal.signature)


# --- the house: four modules, one name; labels permuted inside sites


def test_every_name_of_the_chapter_is_reachable_from_evaluation_and_defined_once():
    for module in (intervals, comparison, clinical):
        for name in module.__all__:
            assert getattr(ev, name) is getattr(module, name) and name in ev.__all__, name
    star = {}
    exec("from her2_mil.evaluation import *", star)
    assert {
        "auc_table",
        "auc_within",
        "auc_interval",
        "compare_arms",
        "calibration",
        "detectable_difference",
        "permutation_test",
    } <= set(star)
    with pytest.raises(AttributeError, match="no attribute"):
        ev.no_such_name
    with pytest.raises(ImportError):
        exec("from her2_mil.evaluation import no_such_name", {})


def permuted_labels(y, patient, site, rng):
    "As `cross_validate` permutes them: over patients, or inside each site"
    return _permute(pd.DataFrame(dict(patient_id=patient, cohort="main")), np.asarray(y), rng, site)


@quick
@given(st.integers(0, 10**6))
def test_labels_permuted_inside_sites_keep_each_sites_counts(seed):
    rng = np.random.default_rng(seed)
    owner = np.r_[np.arange(25), rng.integers(0, 25, 15)]
    label, where = rng.integers(0, 4, 25), rng.choice(["x", "z", "w", ""], 25)
    y, patient, site = label[owner], np.array([f"p{i}" for i in owner]), where[owner]
    inside, over = permuted_labels(y, patient, site, rng), permuted_labels(y, patient, None, rng)
    for new in (inside, over):
        assert pd.Series(new).groupby(patient).nunique().max() == 1 and sorted(new[:25]) == sorted(label)
    for s in set(where):
        assert sorted(inside[:25][where == s]) == sorted(label[where == s])


def test_permuting_inside_sites_keeps_what_the_site_tells_and_permuting_over_all_does_not():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(10), 20)
    y = np.where(rng.random(200) < 0.8, site % 4, rng.integers(0, 4, 200))
    t = table(3 * np.eye(4)[site % 4], y, np.arange(200) % 5)
    null = lambda s: ev.permutation_test(
        t, [t.assign(y=permuted_labels(y, t.patient_id, s, rng)) for _ in range(60)]
    ).iloc[0]
    assert null(site).null_mean > 0.75 and null(site).p > 0.05
    assert abs(null(None).null_mean - 0.5) < 0.03 and null(None).p < 0.05


def test_labels_that_a_csv_file_made_floats_change_nothing():
    t = two(table(np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 4, np.arange(40) // 8, site="x"))
    floats = pd.concat([t, t.assign(split="external", y=np.nan)])
    for f in (
        ev.auc_table,
        ev.auc_within,
        ev.calibration,
        ev.ordinal_metrics,
        ev.risk_coverage,
        ev.endpoint_table,
        ev.compare_arms,
    ):
        pd.testing.assert_frame_equal(f(t), f(floats))
    pd.testing.assert_series_equal(ev.confounding(t), ev.confounding(floats))


def test_more_classes_than_colours_are_all_drawn():
    plt.switch_backend("Agg")
    classes, rng = [f"c{i}" for i in range(8)], np.random.default_rng(1)
    t = table(rng.normal(size=(64, 8)), np.arange(64) % 8, 0).assign(
        **{f"logit{c}": rng.normal(size=64) for c in range(4, 8)}
    )
    drawn = ev.plot_reliability(ev.reliability_table(t, classes=classes))
    assert [line.get_label() for line in drawn.lines if not line.get_label().startswith("_")] == classes
    assert len(ev.plot_roc(ev.roc_curves(t, n_boot=5, classes=classes)).lines) == 9
    plt.close("all")


def test_columns_of_the_manifest_can_split_a_table():
    t = table(
        np.random.default_rng(0).normal(size=(40, 4)),
        np.arange(40) % 4,
        0,
        antibody=np.where(np.arange(40) < 20, "4B5", "A0485"),
    )
    assert (
        set(ev.auc_table(t, by="antibody").antibody) == {"4B5", "A0485"}
        and ev.auc_within(t, by="antibody").n_groups.max() == 2
    )


def test_what_no_comparison_can_rest_on_is_said():
    rng = np.random.default_rng(0)
    t = table(rng.normal(size=(40, 4)), np.arange(40) % 4, 0)
    repeats = two(pd.concat([t, t.assign(repeat=1)]))
    with pytest.raises(ev.EvaluationError, match="one fold"):
        ev.compare_arms(repeats)
    with pytest.raises(ev.EvaluationError, match="no column run"):
        ev.permutation_test(t, t)


def test_nuisance_with_missing_labels_and_infinite_values():
    rng, y, folds = np.random.default_rng(0), np.arange(40) % 4, np.arange(40) // 8
    size, patients = rng.normal(size=40), [f"p{i}" for i in range(40)]
    whole = ev.nuisance_auc(pd.DataFrame(dict(size=size)), y, folds, patients)
    more = ev.nuisance_auc(
        pd.DataFrame(dict(size=np.r_[size, 1.0])), np.r_[y, np.nan], np.r_[folds, 0], [*patients, "z"]
    )
    pd.testing.assert_frame_equal(whole, more)
    lost, infinite = (np.where(np.arange(40) == 3, v, size) for v in (np.nan, np.inf))
    pd.testing.assert_frame_equal(
        *(ev.nuisance_auc(pd.DataFrame(dict(size=x)), y, folds, patients) for x in (lost, infinite))
    )
