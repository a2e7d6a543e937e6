"""Every estimator of `her2_mil.evaluation` against slow, plain or foreign implementations, on input found by hypothesis."""
import warnings
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_auc_score
from her2_mil import evaluation as ev

scores = st.lists(st.integers(0, 6), min_size=2, max_size=12)
quick = settings(max_examples=25, deadline=None)


def brute(pos, neg):
    "AUC and DeLong's standard error by double loops"
    psi = [[1. if a > b else .5 if a == b else 0. for b in neg] for a in pos]
    m, k = len(pos), len(neg)
    auc = sum(map(sum, psi))/(m*k)
    v10 = [sum(r)/k for r in psi]
    v01 = [sum(psi[i][j] for i in range(m))/m for j in range(k)]
    s10, s01 = (sum((v - auc)**2 for v in vs)/(len(vs) - 1) for vs in (v10, v01))
    return auc, (s10/m + s01/k)**.5


def table(logits, y, fold, patient=None, **kw):
    n = len(y)
    return pd.DataFrame(dict(arm='a', pretrain_seed=0, seed=0, repeat=0, fold=fold, split='test', slide_id=[f's{i}' for i in range(n)],
                             patient_id=[f'p{i}' for i in range(n)] if patient is None else patient, y=y, **{f'logit{c}': logits[:, c] for c in range(4)})).assign(**kw)


@quick
@given(scores, scores)
def test_auc_and_standard_error_against_double_loops(pos, neg):
    s = ev._summary(np.array(pos, float)[None], np.array(neg, float)[None])
    auc, se = brute(pos, neg)
    assert s.a[0] == pytest.approx(auc, abs=1e-6) and s.se[0] == pytest.approx(se, abs=1e-6)
    v, _, _ = ev._placements(np.r_[pos, neg], np.r_[np.ones(len(pos)), np.zeros(len(neg))] > 0, np.zeros(len(pos) + len(neg), int))
    assert v[:len(pos)].mean() == pytest.approx(auc)


@quick
@given(scores, scores, st.sampled_from(list(ev._METHODS)))
def test_every_interval_lies_in_0_to_1_and_turns_round_with_the_labels(pos, neg, method):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        y, s = np.r_[np.ones(len(pos)), np.zeros(len(neg))], np.r_[pos, neg].astype(float)
        a, b = ev.auc_interval(y, s, method, n_boot=200), ev.auc_interval(1 - y, s, method, n_boot=200)
    assert 0 <= a.low <= a.high <= 1
    assert a.auc == pytest.approx(1 - b.auc, abs=1e-6)
    if method not in ev._BOOT:
        assert a.low == pytest.approx(1 - b.high, abs=1e-6) and a.low - 1e-9 <= a.auc <= a.high + 1e-9


@quick
@given(st.integers(0, 10**6))
def test_delong_test_against_covariance_by_hand(seed):
    rng = np.random.default_rng(seed)
    y, a = np.arange(24) % 3 == 0, rng.integers(0, 8, 24)
    b = a + rng.integers(-3, 4, 24)
    psi = [np.array([[1. if p > q else .5 if p == q else 0. for q in s[~y]] for p in s[y]]) for s in (a, b)]
    cov = np.cov([p.mean(1) for p in psi])/y.sum() + np.cov([p.mean(0) for p in psi])/(~y).sum()
    var, r = cov[0, 0] + cov[1, 1] - 2*cov[0, 1], ev.delong_test(y, a, b)
    assert r.se == pytest.approx(np.sqrt(max(var, 0)), abs=1e-7)
    if var > 1e-12:
        assert r.p == pytest.approx(2*stats.norm.sf(abs(psi[0].mean() - psi[1].mean())/np.sqrt(var)))


@quick
@given(st.integers(0, 10**6), st.sets(st.integers(0, 3), min_size=1), st.integers(1, 4))
def test_auc_table_is_sklearn_or_nan_whatever_scores_are_missing(seed, present, n_folds):
    rng = np.random.default_rng(seed)
    y, fold, logits = rng.choice(sorted(present), 40), rng.integers(0, n_folds, 40), np.round(rng.normal(size=(40, 4)), 1)
    r = ev.auc_table(table(logits, y, fold)).query("estimand == 'within folds'").set_index('score')
    p, each = ev._softmax(logits), []
    for c in range(4):
        cells = [roc_auc_score(y[fold == f] == c, p[fold == f, c]) for f in np.unique(fold) if 0 < (y[fold == f] == c).sum() < (fold == f).sum()]
        each.append(np.mean(cells) if cells else np.nan)
        assert r.auc[ev.SCORES[c]] == pytest.approx(each[-1], nan_ok=True)
        assert r.undefined[ev.SCORES[c]] == len(np.unique(fold)) - len(cells)
        if cells:
            assert 0 <= r.low[ev.SCORES[c]] <= r.auc[ev.SCORES[c]] + 1e-9 and r.auc[ev.SCORES[c]] - 1e-9 <= r.high[ev.SCORES[c]] <= 1
    assert r.auc['macro'] == pytest.approx(np.mean(each), nan_ok=True)


def test_mean_logits_of_several_slides():
    rng = np.random.default_rng(0)
    y, logits = np.repeat(np.arange(20) % 4, 2), rng.normal(size=(40, 4))
    both = table(logits, y, 0, patient=[f'p{i//2}' for i in range(40)])
    mean = table(logits.reshape(20, 2, 4).mean(1), y[::2], 0)
    cols = ['auc', 'low', 'high', 'n_patients']
    pd.testing.assert_frame_equal(ev.auc_table(both)[cols], ev.auc_table(mean)[cols])


def test_interval_agrees_with_a_bootstrap_of_patients_over_repeats_and_seeds():
    rng = np.random.default_rng(1)
    n, y = 80, np.arange(80) % 4
    latent, parts = np.eye(4)[y] + rng.normal(size=(n, 4)), []
    for seed in range(3):
        parts.append(table(latent + .5*rng.normal(size=(n, 4)), y, rng.permutation(n//4*4) % 4, seed=seed))
    t = pd.concat(parts, ignore_index=True)
    row, drawn = ev.auc_table(t).query("estimand == 'pooled' and score == 'macro'").iloc[0], []
    p = [ev._softmax(q[ev._LOGITS].to_numpy()) for q in parts]
    for _ in range(400):
        i = np.concatenate([rng.choice(np.flatnonzero(y == c), 20) for c in range(4)])
        drawn.append(np.mean([roc_auc_score(y[i] == c, q[i, c]) for q in p for c in range(4)]))
    assert row.se == pytest.approx(np.std(drawn), rel=.15)


@quick
@given(st.integers(0, 10**6))
def test_weighted_metrics_equal_repeating_patients(seed):
    rng = np.random.default_rng(seed)
    y, fold, logits, w = np.arange(24) % 4, np.arange(24)//12, np.round(rng.normal(size=(24, 4)), 1), rng.integers(0, 3, 24)
    w[:4], w[12:16] = 1, 1
    t = ev.patient_table(table(logits, y, fold))
    order = t.patient_id.str[1:].astype(int).to_numpy()
    ours, i = ev._ordinal(t, w[order][None].astype(float)), np.repeat(np.arange(24), w)
    p = ev._softmax(logits)
    assert ours['quadratic-weighted kappa'][0] == pytest.approx(cohen_kappa_score(y[i], p[i].argmax(1), weights='quadratic', labels=range(4)))
    e = p @ np.arange(4)
    d = [stats.somersd(y[i][fold[i] == f], e[i][fold[i] == f]).statistic for f in (0, 1)]
    assert ours["Somers' D"][0] == pytest.approx(np.mean(d))
    if (y[i] == 3).any():
        assert ev._average_precision(y == 3, p[:, 3], w[None])[0] == pytest.approx(average_precision_score(y[i] == 3, p[i, 3]))


def test_corrected_variance_of_nadeau_and_bengio_by_hand():
    d = np.array([.02, .05, -.01, .04, .03, .06, 0., .02, .05, .01])
    t = d.mean()/np.sqrt((1/10 + 20/80)*d.var(ddof=1))
    r = ev._compare(d, [], 20/80, .95)
    assert r['t'] == pytest.approx(t) and r['p'] == pytest.approx(2*stats.t.sf(t, 9))


def test_random_effect_follows_welch_where_only_seeds_vary():
    a, b = np.array([.6, .62, .58, .65, .61]), np.array([.55, .5, .59, .52, .57])
    r, w = ev._compare(np.full(10, a.mean() - b.mean()), [a, b], .25, .95), stats.ttest_ind(a, b, equal_var=False)
    assert r['t'] == pytest.approx(w.statistic) and r['p'] == pytest.approx(w.pvalue) and r['df'] == pytest.approx(w.df)


def test_one_patient_and_constant_predictions():
    one = ev.auc_table(table(np.zeros((1, 4)), np.array([2]), 0))
    assert one.auc.isna().all() and one.low.isna().all()
    flat = ev.auc_table(table(np.zeros((40, 4)), np.arange(40) % 4, np.arange(40)//8)).query('primary').iloc[0]
    assert flat.auc == .5 and flat.low < .5 < flat.high
    m = ev.ordinal_metrics(table(np.zeros((40, 4)), np.arange(40) % 4, 0), n_boot=20).set_index('metric').value
    assert m['balanced accuracy'] == .25 and m["Somers' D"] == 0
