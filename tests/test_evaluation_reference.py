"""Every estimator of `her2_mil.evaluation` against slow, plain or foreign implementations, on input found by hypothesis."""
import warnings
from io import StringIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, cohen_kappa_score, log_loss, mean_absolute_error, mean_squared_error, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from conftest import ROOT
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


# --- intervals and tables against other implementations


@pytest.mark.parametrize('method, theirs', [('percentile', 'percentile'), ('bca', 'BCa')])
def test_bootstrap_intervals_against_scipy(method, theirs):
    rng = np.random.default_rng(5)
    pos, neg = rng.normal(1, 1.5, 30), rng.normal(size=45)
    auc = lambda p, n, axis=-1: (p[..., :, None] > n[..., None, :]).mean((-1, -2))
    r = stats.bootstrap((pos, neg), auc, method=theirs, n_resamples=4000, rng=np.random.default_rng(0), vectorized=True, batch=500).confidence_interval
    ours = ev.auc_interval(np.r_[np.ones(30), np.zeros(45)], np.r_[pos, neg], method, n_boot=4000)
    assert [ours.low, ours.high] == pytest.approx([r.low, r.high], abs=.012)


def test_logit_bootstrap_is_the_spread_of_scipys_resamples():
    rng = np.random.default_rng(6)
    pos, neg = rng.normal(1, 1, 30), rng.normal(size=45)
    auc = lambda p, n, axis=-1: (p[..., :, None] > n[..., None, :]).mean((-1, -2))
    drawn = stats.bootstrap((pos, neg), auc, method='percentile', n_resamples=4000, rng=np.random.default_rng(0), vectorized=True, batch=500).bootstrap_distribution
    logit = lambda x: np.log(x/(1 - x))
    half, centre = 1.959964*logit(np.clip(drawn, .5/1350, 1 - .5/1350)).std(ddof=1), logit(auc(pos, neg))
    ours = ev.auc_interval(np.r_[np.ones(30), np.zeros(45)], np.r_[pos, neg], 'logit bootstrap', n_boot=4000)
    assert [logit(ours.low), logit(ours.high)] == pytest.approx([centre - half, centre + half], abs=.08)


def test_committed_coverage_is_what_its_cell_writes():
    "Random rows of data/coverage.csv, recomputed with the same seed, digit for digit"
    there = pd.read_csv(ROOT/'nbs'/'data'/'coverage.csv')
    cells = there[['n', 'prevalence', 'auc', 'spread']].drop_duplicates()
    assert len(cells) == 160 and (there.groupby(list(cells)).size() == len(ev._METHODS)).all() and (there.cohorts >= 1000).all()
    for c in [*cells.query('n <= 40').sample(5, random_state=1).itertuples(), *cells.query('n == 100').sample(1, random_state=1).itertuples()]:
        ours = pd.read_csv(StringIO(ev._coverage(c.n, c.prevalence, c.auc, c.spread, cohorts=2000).round(4).to_csv(index=False)))
        same = there.query(f'n == {c.n} and prevalence == {c.prevalence} and auc == {c.auc} and spread == {c.spread}').reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, same, check_exact=True)


@pytest.mark.parametrize('name', ['coverage', 'macro', 'type1', 'chance'])
def test_every_committed_simulation_has_a_thousand_cohorts(name):
    t = pd.read_csv(ROOT/'nbs'/'data'/f'{name}.csv')
    assert (t.cohorts >= 1000).all() and set(t.run) == {name} and t.seed.notna().all()


@quick
@given(st.integers(0, 10**6))
def test_family_wise_p_against_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    obs, null = rng.normal(.2, 1, 4)*[1, 1, 2, 5], rng.normal(size=(30, 4))*[1, 1, 2, 5]
    p, family = ev._permutation_p(obs, null)
    rows = [list(obs), *map(list, null)]
    mean, sd = [np.mean([r[k] for r in rows]) for k in range(4)], [np.std([r[k] for r in rows]) for k in range(4)]
    top = [max((r[k] - mean[k])/sd[k] for k in range(4)) for r in rows]
    for k in range(4):
        assert p[k] == pytest.approx((1 + sum(r[k] >= obs[k] for r in null))/31)
        assert family[k] == pytest.approx(sum(t >= (obs[k] - mean[k])/sd[k] - 1e-9 for t in top)/31)
        assert family[k] >= p[k] - 1e-12


@quick
@given(st.integers(0, 10**6))
def test_scores_and_calibration_against_sklearn_and_plain_loops(seed):
    rng = np.random.default_rng(seed)
    y, logits = np.arange(40) % 4, rng.normal(size=(40, 4))
    t = table(logits, y, np.arange(40)//8)
    p = ev._softmax(logits)
    e, call = p @ np.arange(4), p.argmax(1)
    m = ev.ordinal_metrics(t, n_boot=5).set_index('metric').value
    assert m['MAE (argmax)'] == pytest.approx(mean_absolute_error(y, call)) and m['MAE (expected score)'] == pytest.approx(mean_absolute_error(y, e))
    assert m['adjacent accuracy (argmax)'] == pytest.approx(np.mean([abs(a - b) <= 1 for a, b in zip(y, call)]))
    assert m['adjacent accuracy (expected score)'] == pytest.approx(np.mean([abs(a - round(b)) <= 1 for a, b in zip(y, e)]))
    c = ev.calibration(t, n_null=5).iloc[0]
    assert c.brier == pytest.approx(sum(mean_squared_error(y == k, p[:, k]) for k in range(4)))
    gap = 0
    for b in range(10):
        i = [j for j in range(40) if b/10 <= p[j].max() < (b + 1)/10]
        if i:
            gap += len(i)/40*abs(np.mean([call[j] == y[j] for j in i]) - np.mean([p[j].max() for j in i]))
    assert c.ece == pytest.approx(gap)


def test_temperature_against_a_grid():
    rng = np.random.default_rng(2)
    y, logits = np.arange(80) % 4, 3*rng.normal(size=(80, 4))
    logits[np.arange(80), y] += 2
    grid = np.geomspace(.05, 20, 4000)
    loss = [log_loss(y, ev._softmax(logits/g)) for g in grid]
    assert ev._temperature(logits, y) == pytest.approx(grid[np.argmin(loss)], rel=.01)


def test_risk_coverage_by_sorting():
    rng = np.random.default_rng(3)
    y, logits = np.arange(40) % 4, rng.normal(size=(40, 4))
    p = ev._softmax(logits)
    order = sorted(range(40), key=lambda i: -p[i].max())
    for r in ev.risk_coverage(table(logits, y, 0), n_boot=5).itertuples():
        surest = order[:int(np.ceil(r.coverage*40 - 1e-9))]
        assert r.risk == pytest.approx(np.mean([p[i].argmax() != y[i] for i in surest]))


def test_stains_spared_against_bayes_and_statsmodels():
    y = np.r_[np.full(20, 3), np.arange(60) % 3]
    low3 = np.r_[np.arange(20) < 5, np.arange(60) < 40]  # p(3+) below the threshold: 5 of 20 positives, 40 of 60 negatives
    logits = np.zeros((80, 4))
    logits[:, 3] = np.where(low3, -9, 9)
    r = ev.stains_spared(table(logits, y, 0), .2, thresholds=(.5,), draws=200_000).iloc[0]
    assert (r.sensitivity, r.specificity) == (.75, pytest.approx(2/3))
    assert r.npv == pytest.approx(2/3*.8/(2/3*.8 + .25*.2)) and r.spared == pytest.approx(1000*(.25*.2 + 2/3*.8))
    assert [r.missed_low/200, r.missed_high/200] == pytest.approx(proportion_confint(5, 20, method='jeffreys'), abs=.003)


# --- input from which nothing, or little, can be known


def degenerate():
    y = np.arange(40) % 4
    five, wrong = np.arange(40)//8, np.where(y == 3, 1 + np.arange(40)//4 % 4, np.arange(40)//4 % 5)
    noise = np.random.default_rng(0).normal(size=(40, 4))
    yield 'one patient', table(noise[:1], np.array([2]), 0)
    yield 'two patients', table(noise[:2], np.array([2, 3]), 0)
    yield 'one score', table(noise[:12], np.full(12, 1), np.arange(12) % 3)
    yield 'no 3+', table(noise[:30], np.arange(30) % 3, np.arange(30)//3 % 5)
    yield '3+ missing in a fold', table(noise, y, wrong)
    yield 'one patient a fold', table(noise[:8], np.arange(8) % 4, np.arange(8))
    yield 'constant', table(np.zeros((40, 4)), y, five)
    yield 'separated', table(50.*np.eye(4)[y], y, five)
    yield 'huge', table(1e300*np.eye(4)[y], y, five)
    yield 'NaN', table(np.full((40, 4), np.nan), y, five)
    yield 'infinite', table(np.full((40, 4), np.inf), y, five)
    yield 'no score', table(noise, y, five).assign(y=np.nan)
    yield 'no patient', table(noise, y, five).assign(patient_id=None)
    yield 'no fold', table(noise, y, five).assign(fold=np.nan)
    yield 'empty', table(noise, y, five)[:0]


def two(t):
    return pd.concat([t, t.assign(arm='b')])


REFUSED = {'NaN', 'infinite', 'no score', 'no patient', 'no fold', 'empty'}
FUNCTIONS = dict(auc_table=ev.auc_table, by_site=lambda t: ev.auc_table(t, by='site'), endpoint_table=lambda t: ev.endpoint_table(t, n_boot=20), ordinal_metrics=lambda t: ev.ordinal_metrics(t, n_boot=20),
                 calibration=lambda t: ev.calibration(t, n_null=20), risk_coverage=lambda t: ev.risk_coverage(t, n_boot=20), stains_spared=lambda t: ev.stains_spared(t, .1), confounding=ev.confounding,
                 failure_signatures=ev.failure_signatures, compare_arms=lambda t: ev.compare_arms(two(t)), compare_cohorts=lambda t: ev.compare_cohorts([two(t)]*3),
                 permutation_test=lambda t: ev.permutation_test(t, [t]*5), plot_roc=lambda t: ev.plot_roc(t, n_boot=20), plot_confusion=ev.plot_confusion, plot_scores=ev.plot_scores,
                 plot_reliability=ev.plot_reliability)
BOUNDED = ['auc', 'low', 'high', 'pr_auc', 'risk', 'sensitivity', 'specificity', 'npv', 'npv_low', 'npv_high', 'p', 'p_holm', 'p_family', 'ece', 'ece_p', 'observed']


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('what, t', list(degenerate()), ids=[w for w, _ in degenerate()])
@pytest.mark.filterwarnings('error')
def test_degenerate_input_gives_a_sentence_or_nan_never_a_wrong_number(name, what, t):
    plt.switch_backend('Agg')
    try:
        r = FUNCTIONS[name](t.assign(site=np.where(np.arange(len(t))//4 % 2, 'x', 'z'), n_patches=10, attention_entropy=2.))
    except ev.EvaluationError as e:
        assert len(str(e)) > 20 and (what in REFUSED or name in ('compare_arms', 'compare_cohorts', 'permutation_test'))
        return
    finally:
        plt.close('all')
    assert what not in REFUSED
    if isinstance(r, pd.DataFrame) and name not in ('compare_arms', 'compare_cohorts', 'ordinal_metrics', 'failure_signatures'):
        for c in set(BOUNDED) & set(r):
            assert r[c].dropna().between(0, 1).all(), (c, r[c])
    if {'low', 'high'} <= set(getattr(r, 'columns', [])):  # no interval pretends to know everything
        known = r.dropna(subset=['low', 'high'])
        assert (known.low < known.high).all()


def test_identical_or_constant_arms_have_no_interval():
    y, a = np.arange(40) % 4, np.random.default_rng(0).normal(size=40)
    assert np.isnan(ev.delong_test(y == 3, a, a).low) and ev.delong_test(y == 3, a, a).p == 1
    r = ev._compare(np.full(5, .1), [], .25, .95)
    assert np.isnan([r['low'], r['high'], r['p']]).all()
