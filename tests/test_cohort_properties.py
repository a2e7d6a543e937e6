"Properties of manifests and folds, searched by hypothesis: what notebook 00 states, on tables nobody thought of."
import csv, io, os, random, tempfile
from pathlib import Path

import numpy as np, pandas as pd, pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from her2_mil.cohort import SCORES, ManifestError, _RULES, _cell, from_clam, patient_folds, read_manifest, to_clam, write_manifest
from her2_mil.slide import SlideError, fetch_slide

quick = settings(max_examples=int(os.environ.get('HYPOTHESIS_EXAMPLES', 25)), deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
HEADER = ['slide_id', 'patient_id', 'her2_score', 'uri', 'sha256', 'mpp', 'cohort', 'ish', 'roi', 'site']


def read(data, **kw):
    "`read_manifest` of bytes or text"
    with tempfile.TemporaryDirectory() as d:
        path = Path(d)/'m.csv'
        path.write_bytes(data if isinstance(data, bytes) else data.encode('utf-8', 'surrogatepass'))
        return read_manifest(path, **kw)


def table(rows, sep=','):
    "CSV text of a list of dicts"
    out = io.StringIO()
    w = csv.DictWriter(out, HEADER, delimiter=sep, restval='', lineterminator='\n')
    w.writeheader(); w.writerows(rows)
    return out.getvalue()


def good_rows(n):
    "n valid rows, two slides a patient"
    return [dict(slide_id=f's{i}', patient_id=f'p{i // 2}', her2_score=SCORES[i // 2 % 4], uri=f'slides/s{i}.svs', sha256=f'{i:064x}', mpp='0.25', site=f'site{i % 3}')
            for i in range(n)]


@st.composite
def cohorts(draw, sites=4):
    "A table with n_folds patients or more of each score that is there, several slides a patient, some external rows"
    n_folds = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.one_of(st.just(0), st.integers(n_folds, 20)), min_size=4, max_size=4).filter(any))
    rows, rng = [], random.Random(draw(st.integers(0, 2**32)))
    for p, s in enumerate(s for s, n in enumerate(sizes) for _ in range(n)):
        rows += [dict(patient_id=f'p{p}', y=s, cohort='main', site=f'site{rng.randrange(sites)}')] * rng.choice([1, 1, 1, 2, 5])
    rows += [dict(patient_id=f'x{p}', y=rng.randrange(4), cohort='external', site='elsewhere') for p in range(draw(st.integers(0, 5)))]
    rng.shuffle(rows)
    return pd.DataFrame(rows), n_folds, draw(st.integers(0, 2**31))


@quick
@given(cohorts())
def test_folds_keep_their_promises(case):
    df, n_folds, seed = case
    fold = patient_folds(df, n_folds, seed)
    main = df['cohort'] == 'main'
    assert fold.dtype == np.int64 and len(fold) == len(df)
    assert (fold[~main] == -1).all() and set(fold[main]) == set(range(n_folds))
    each = df.assign(fold=fold)[main].groupby('patient_id').agg(fold=('fold', 'first'), n=('fold', 'nunique'), y=('y', 'first'), slides=('y', 'size'))
    assert (each['n'] == 1).all(), 'a patient is split over folds'
    by_score = pd.crosstab(each['fold'], each['y'])
    assert np.ptp(by_score.to_numpy(), axis=0).max() <= 1, 'a score is uneven by more than one patient'
    assert np.ptp(by_score.sum(axis=1)) <= 1, 'fold sizes differ by more than one patient'
    slides = pd.crosstab(each['fold'], each['y'], each['slides'], aggfunc='sum').fillna(0)
    assert np.ptp(slides.to_numpy(), axis=0).max() <= each['slides'].max(), 'slides of a score are uneven by more than one patient has'


@quick
@given(cohorts(), st.randoms(use_true_random=False))
def test_folds_depend_on_patients_only(case, rng):
    df, n_folds, seed = case
    fold = patient_folds(df, n_folds, seed)
    order = rng.sample(range(len(df)), len(df))
    assert (patient_folds(df.iloc[order].reset_index(drop=True), n_folds, seed) == fold[order]).all()
    main = (df['cohort'] == 'main').to_numpy()
    assert (patient_folds(df[main], n_folds, seed) == fold[main]).all()


@quick
@given(cohorts(sites=12))
def test_sites_stay_whole_or_it_is_said(case):
    df, n_folds, seed = case
    try: fold = patient_folds(df, n_folds, seed, by_site=True)
    except ManifestError as e:
        assert 'folds that keep sites whole need' in str(e)
        return
    main = (df['cohort'] == 'main').to_numpy()
    for column in ('site', 'patient_id'): assert (pd.Series(fold[main]).groupby(df[column][main].to_numpy()).nunique() == 1).all()
    assert (pd.crosstab(fold[main], df['y'][main]) > 0).all(axis=None), 'a fold lacks a score'


@quick
@given(st.lists(st.integers(0, 12), min_size=4, max_size=4).filter(any), st.integers(2, 6))
def test_infeasible_requests_give_the_counts(sizes, n_folds):
    y = np.repeat(np.arange(4), sizes)
    df = pd.DataFrame({'patient_id': [f'p{i}' for i in range(len(y))], 'y': y})
    assume(any(0 < n < n_folds for n in sizes))
    with pytest.raises(ManifestError) as e: patient_folds(df, n_folds)
    for s, n in enumerate(sizes): assert n == 0 or f'{SCORES[s]}: {n}' in str(e.value)


BAD = dict(slide_id=['', '../x', 'a b', '.a', 'x' * 200, '=A1'], patient_id=['', 'a/b', '@p', '\u00fcber'], her2_score=['', '4', 'x', '0+', 'ULTRALOW', '2.0', '=1'],
           uri=['', '../a.svs', '/a.svs', 'http://a/b', 'phantom:score=9;seed=1', 'https://u:p@h/x', 'a\\b'], sha256=['12', 'z' * 64], mpp=['0', '-1', '99', 'nan', 'abc', '1e999'],
           cohort=['training', 'extern'], ish=['maybe'], roi=['../r.geojson', 'C:/r.geojson'], site=['=1+1', '#REF!', 'a\u202eb', 'a\nb'])


@quick
@given(st.data())
def test_every_bad_cell_is_reported_and_no_other(data):
    rows = good_rows(data.draw(st.integers(2, 12)))
    where = data.draw(st.sets(st.tuples(st.integers(0, len(rows) - 1), st.sampled_from(HEADER)), max_size=6))
    for i, c in where: rows[i][c] = data.draw(st.sampled_from(BAD[c]))
    if not where:
        read(table(rows))
        return
    with pytest.raises(ManifestError) as e: read(table(rows, data.draw(st.sampled_from(',;\t'))))
    found = {(r - 2, c) for r, c, *_ in e.value.problems}
    assert found == where
    for r, c, v, why in e.value.problems: assert f'row {r}, column {c}, value ' in str(e.value) and why in str(e.value)


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_row_numbers_count_empty_rows(gaps):
    rows, lines, number = good_rows(len(gaps)), [','.join(HEADER)], []
    for r, gap in zip(rows, gaps):
        lines += ['', ',' * (len(HEADER) - 1)][:gap] + [''] * max(0, gap - 2)
        r['mpp'] = '77'
        lines.append(','.join(r.get(c, '') for c in HEADER)); number.append(len(lines))
    with pytest.raises(ManifestError) as e: read('\r\n'.join(lines))
    assert [r for r, *_ in e.value.problems] == number


text = st.text(st.characters(codec='utf-8'), max_size=12)


@quick
@given(st.one_of(st.binary(max_size=300), st.text(max_size=300), st.lists(st.lists(text, max_size=6), max_size=6).map(lambda t: '\n'.join(','.join(r) for r in t)),
                 st.lists(text, min_size=4, max_size=4).map(lambda r: 'slide_id,patient_id,her2_score,uri\n' + ','.join(r))))
def test_whatever_the_file_holds_it_is_a_manifest_error_or_a_valid_table(data):
    try: df = read(data)
    except ManifestError as e: assert str(e).startswith('m.csv: ') and str(e).splitlines()[0].isprintable()
    else: assert df['slide_id'].map(lambda s: _RULES['slide_id'](s) == s != '').all() and df['y'].between(0, 3).all()


@quick
@given(text)
def test_no_formula_survives_reading(cell):
    try: out = _cell(cell)
    except ValueError: return
    assert out.isprintable() and out == out.strip()
    if out[:1] in ('=', '@', '+', '-'): assert out in '+-' or out.lstrip('+-').replace('.', '').isdigit()


@quick
@given(st.lists(st.sampled_from(['', 'Leica GT450', 'a,b', 'say "x"', 'a;b', '-', '3', "O'Neill", 'caf\u00e9', '\u4e2d']), min_size=8, max_size=8))
def test_what_is_written_reads_back_the_same(sites):
    df = read(table([{**r, 'site': s} for r, s in zip(good_rows(8), sites)]))
    with tempfile.TemporaryDirectory() as d:
        back = read_manifest(write_manifest(df, Path(d)/'m.csv'))
        assert os.listdir(d) == ['m.csv']
    pd.testing.assert_frame_equal(back, df)


@quick
@given(st.text(st.characters(codec='utf-8', exclude_categories=['Cc', 'Cs']), min_size=1))
def test_no_written_cell_starts_a_formula(site):
    df = read(table(good_rows(2))).assign(site=site)
    with tempfile.TemporaryDirectory() as d: written = write_manifest(df, Path(d)/'m.csv').read_text(encoding='utf-8')
    assert all(r['site'][:1] not in ('=', '+', '-', '@') for r in csv.DictReader(io.StringIO(written, newline='')))


@quick
@given(cohorts())
def test_clam_and_back(case):
    df, n_folds, seed = case
    df = df.assign(slide_id=[f's{i}' for i in range(len(df))])
    folds = patient_folds(df, n_folds, seed)
    assume(len(set(df['y'])) > 1)
    with tempfile.TemporaryDirectory() as d:
        to_clam(df, folds, d)
        cohort, again = from_clam(Path(d)/'labels.csv', d)
        for k in range(n_folds):
            split = pd.read_csv(Path(d)/f'splits_{k}.csv', index_col=0)
            assert list(split.columns) == ['train', 'val', 'test']
            parts = [set(split[c].dropna()) for c in split]
            assert sum(map(len, parts)) == len(set.union(*parts)) == (folds >= 0).sum()
    assert cohort['slide_id'].tolist() == df['slide_id'].tolist() and cohort['y'].tolist() == df['y'].tolist()
    assert (again == folds).all()
    assert cohort['cohort'].tolist() == df['cohort'].tolist(), 'external slides come back as main'
    assert (patient_folds(cohort, n_folds, seed) == folds).all()


CLAM = 'case_id,slide_id,label\np,a,0\np,b,0\nq,c,3+\nr,d,0\n'


@pytest.mark.parametrize('splits, why', [
    (['a,,b', 'c,,a'], 'splits_0.csv: patient_id p is in train and in test'), (['c,a,b'], 'splits_0.csv: patient_id p is in val and in test'),
    (['a,b,c'], 'splits_0.csv: patient_id p is in train and in val'), (['a,a,c'], 'splits_0.csv: slide_id a is in train and in val'),
    (['a,c,c'], 'splits_0.csv: slide_id c is in val and in test'), (['a,c,d', 'd,a,c'], 'splits_0.csv: slide a is in train and in no split in test'),
    (['a,,c', 'c,,a', 'c,,b'], 'patient p is tested in two splits')])
def test_splits_that_are_no_folds_are_refused(tmp_path, splits, why):
    (tmp_path/'labels.csv').write_text(CLAM)
    for k, s in enumerate(splits): (tmp_path/f'splits_{k}.csv').write_text(f',train,val,test\n0,{s}\n')
    with pytest.raises(ManifestError, match=why): from_clam(tmp_path/'labels.csv', tmp_path)


def test_whole_numbers_that_pandas_wrote_with_a_point(tmp_path):
    (tmp_path/'labels.csv').write_text('case_id,slide_id,label\np,0,0\nq,1,3+\nr,2,1+\n')
    (tmp_path/'splits_0.csv').write_text(',train,val,test\n0,2,,0.0\n1,,,1.0\n')
    (tmp_path/'splits_1.csv').write_text(',train,val,test\n0,0,,2.0\n1,1,,\n')
    assert from_clam(tmp_path/'labels.csv', tmp_path)[1].tolist() == [0, 0, 1]


def test_surplus_cells_hide_no_other_problem():
    head = 'slide_id,patient_id,her2_score,uri\n'
    with pytest.raises(ManifestError) as e: read(head + 'a,p,9,../x,surplus\nb,q,0,b.svs,, \n')
    assert [(r, c) for r, c, *_ in e.value.problems] == [(2, '(whole row)'), (2, 'her2_score'), (2, 'uri')]
    assert read(head + 'a,p,0,a.svs,,\nb,q,0,b.svs, \n')['uri'].tolist() == ['a.svs', 'b.svs']


def test_an_external_slide_in_a_split_is_refused(tmp_path):
    (tmp_path/'labels.csv').write_text('case_id,slide_id,label,cohort\np,a,0,\nq,b,0,external\n')
    for k, s in enumerate(['a,,b', 'b,,a']): (tmp_path/f'splits_{k}.csv').write_text(f',train,val,test\n0,{s}\n')
    with pytest.raises(ManifestError, match='slide b is external'): from_clam(tmp_path/'labels.csv', tmp_path)


def test_links_inside_the_folder_are_followed(tmp_path):
    study, data = tmp_path/'study', tmp_path/'data'
    study.mkdir(), data.mkdir()
    (data/'a.svs').write_bytes(b'pixels')
    (study/'slides').symlink_to(data, target_is_directory=True)
    (study/'m.csv').write_text('slide_id,patient_id,her2_score,uri,roi\na,p,0,slides/a.svs,slides/a.geojson\n')
    df = read_manifest(study/'m.csv')
    assert fetch_slide(df['uri'][0], df.attrs['root']).resolve() == (data/'a.svs').resolve()
    assert df['roi'][0] == 'slides/a.geojson'


@pytest.mark.parametrize('field', ['colour=2', 'site=Z', 'mpp=nan', 'mpp=0', 'effect=inf', 'size=400x-1', 'label_noise=1.5', 'source_task=none'])
def test_a_bad_phantom_is_refused_in_a_sentence_before_it_is_drawn(tmp_path, field):
    df = read('slide_id,patient_id,her2_score,uri\n' + f'a,p,1+,phantom:score=1;seed=1;{field}\n')
    with pytest.raises(SlideError, match=field.split('=')[0]): fetch_slide(df['uri'][0], cache=tmp_path)
    assert not [*tmp_path.rglob('*.tif*')]


def test_clam_gets_no_slide_without_a_score_and_no_id_it_would_misread(tmp_path):
    df = read(table(good_rows(16)))
    folds = patient_folds(df, 2)
    to_clam(df.assign(y=df['y'].where(df['slide_id'] != 's3', -1)), folds, tmp_path)
    cohort, again = from_clam(tmp_path/'labels.csv', tmp_path)
    assert cohort['slide_id'].tolist() == [s for s in df['slide_id'] if s != 's3'] and again.tolist() == folds[df['slide_id'] != 's3'].tolist()
    for column, bad in (('slide_id', ['17', '007', 'NA']), ('patient_id', ['007', 'NA'])):
        for v in bad:
            ids = [v] * len(df) if v.isdigit() and column == 'patient_id' else [v, *df[column][1:]]
            with pytest.raises(ManifestError, match=f"such as '{v}'"): to_clam(df.assign(**{column: ids}), folds, tmp_path)
