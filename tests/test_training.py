"The stack against separate and plain training, threads, learning curves, callbacks."

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from her2_mil import stack, training
from her2_mil.core import _library, _reached, code_sha256
from her2_mil.evaluation import plot_learning
from her2_mil.mil import AttentionMIL, TorchmilAdapter
from her2_mil.training import Member, TrainConfig, TrainingError, cross_validate, fine_tune, fit_mil, fit_stack, predict

QUICK = TrainConfig(epochs=2, batches=3, bag_size=20, width=8, lr=0.01, attention_lr=1.0)
Y = np.arange(24) % 4


def _bags(seed, low=3, high=40, dim=12):
    "Bags of which some are shorter than a bag of 20 and some longer"
    rng = np.random.default_rng(seed)
    return [rng.normal(0.2 * s, 1, (rng.integers(low, high), dim)).astype(np.float32) for s in Y]


def _members():
    return [
        Member(arm, np.setdiff1d(np.arange(24), np.arange(k, 24, 4 + k)), Y, (k,)) for k in range(3) for arm in "ab"
    ]


ARMS = {"a": _bags(0), "b": _bags(1)}


def _largest_difference(some, others):
    return max(
        (p - q).abs().max().item()
        for m, n in zip(some, others)
        for p, q in zip(m.state_dict().values(), n.state_dict().values())
    )


KINDS = [
    dict(),
    dict(heads=2),
    dict(per_score=True),
    dict(ordinal=True),
    dict(balance="weights", label_smoothing=0.1),
    dict(balance="sampler"),
    dict(redraw=False),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_attention_by_hand_trains_as_the_module_itself(kind, monkeypatch):
    cfg = TrainConfig(**{**vars(QUICK), "double": True, **kind})
    by_hand = fit_stack(ARMS, _members(), cfg)
    monkeypatch.setattr(stack, "_by_hand", lambda template: False)
    assert _largest_difference(by_hand, fit_stack(ARMS, _members(), cfg)) < 1e-10


@pytest.mark.parametrize(
    "kind",
    [*KINDS, dict(gated=True), dict(project=5), dict(pooling="mean"), dict(pooling="max"), dict(pooling="top")],
    ids=str,
)
def test_stack_is_a_set_of_separate_trainings(kind):
    cfg = TrainConfig(**{**vars(QUICK), "double": True, **kind})
    together = fit_stack(ARMS, _members(), cfg, stack=4)
    alone = [fit_stack(ARMS, [m], cfg)[0] for m in _members()]
    assert _largest_difference(together, alone) < 1e-10


def test_threads_do_not_change_a_bit():
    before, models = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        models.append(fit_stack(ARMS, _members(), QUICK, stack=2))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert _largest_difference(*models) == 0


def test_an_error_in_a_thread_is_raised_and_the_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="'median' is not one of"):
        fit_stack(ARMS, _members(), TrainConfig(pooling="median"))
    assert torch.get_num_threads() == before


def test_watching_steers_nothing_and_is_the_loss_of_the_fitted_model():
    plain = fit_stack(ARMS, _members(), QUICK)
    watching = fit_stack(
        ARMS, [Member(m.arm, m.rows, m.y, m.key, watch=np.setdiff1d(np.arange(24), m.rows)) for m in _members()], QUICK
    )
    assert _largest_difference(plain, watching) == 0
    assert np.isnan(plain[0].watched).all() and len(watching[0].watched) == QUICK.epochs
    out = np.setdiff1d(np.arange(24), _members()[0].rows)
    logits = torch.from_numpy(predict(watching[0], [ARMS["a"][i] for i in out]))
    assert watching[0].watched[-1] == pytest.approx(
        nn.functional.cross_entropy(logits, torch.from_numpy(Y[out])).item(), abs=1e-5
    )


def test_history_is_drawn_by_plot_learning():
    cohort = pd.DataFrame(
        dict(
            slide_id=[f"s{i}" for i in range(24)], patient_id=[f"p{i}" for i in range(24)], y=Y, cohort="main", site=""
        )
    )
    table, history = cross_validate(ARMS, cohort, QUICK, n_folds=3, seeds=(0, 1), inner=2, return_history=True)
    assert {"arm", "seed", "fold", "epoch", "train_loss", "test_loss"} <= set(history)
    assert len(history) == 2 * 2 * 3 * QUICK.epochs and history.notna().all(axis=None)
    ax = plot_learning(history, values=("train_loss", "test_loss"))
    drawn = [line for line in ax.lines if len(line.get_xdata())]
    assert len(drawn) == 2 * 2 * 3 * 2
    pd.testing.assert_frame_equal(table, cross_validate(ARMS, cohort, QUICK, n_folds=3, seeds=(0, 1), inner=2))


class _Tiny:
    "Eight features of a small convolutional network, with the interface of an Embedder"

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def normalise(self, x):
        return (x if torch.is_tensor(x) else torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255) - 0.5

    def __call__(self, x):
        with torch.no_grad():
            return self.module(self.normalise(x)).numpy()


PATCHES = [np.random.default_rng(i).integers(0, 255, (8, 16, 16, 3)).astype(np.uint8) for i in range(8)]
SMALL = TrainConfig(epochs=2, bag_size=4, width=4, dropout=0.0)


def test_fine_tune_logs_to_csv_by_default_and_calls_a_callback(tmp_path, monkeypatch):
    class Count(Callback):
        calls = 0

        def after_epoch(self):
            self.calls += 1

    monkeypatch.chdir(tmp_path)
    count = Count()
    fine_tune(_Tiny(), PATCHES, Y[:8], SMALL, cbs=[count])
    assert count.calls == SMALL.epochs
    assert len(pd.read_csv(tmp_path / "fine_tune.csv")) == SMALL.epochs


def test_fine_tune_takes_fastais_tensorboard_callback(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from fastai.callback.tensorboard import TensorBoardCallback

    fine_tune(
        _Tiny(),
        PATCHES,
        Y[:8],
        SMALL,
        log=None,
        cbs=[TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)],
    )
    assert list(tmp_path.rglob("events*"))


@pytest.mark.parametrize("name, normalised", [("ABMIL", False), ("TransMIL", True)])
def test_a_torchmil_model_trains_behind_the_adapter(name, normalised):
    zoo = pytest.importorskip("torchmil.models", reason="torchmil is not installed: pip install torchmil")
    torch.manual_seed(0)
    model = TorchmilAdapter(getattr(zoo, name)(in_shape=(12,), att_dim=16), normalised=normalised)
    x, y = torch.from_numpy(np.stack([b[:8] for b in _bags(0, low=8)])), torch.from_numpy(Y)
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=0.01), []
    for _ in range(8):
        losses.append(nn.functional.cross_entropy(model(x)[0], y))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert torch.allclose(model(x)[1].sum(1), torch.ones(24), atol=1e-5)


def test_bad_members_are_refused_before_anything_trains():
    with pytest.raises(TrainingError, match="no training slide"):
        fit_stack(ARMS, [Member("a", np.array([], int), Y)], QUICK)
    with pytest.raises(TrainingError, match=r"training labels \[0, 1, 2, 3, 4\]"):
        fit_mil(ARMS["a"][:5], np.arange(5), QUICK)
    assert isinstance(fit_mil(ARMS["a"], Y, QUICK), AttentionMIL)


COHORT = pd.DataFrame(
    dict(
        slide_id=[f"s{i}" for i in range(24)],
        patient_id=[f"p{i}" for i in range(24)],
        y=Y,
        cohort="main",
        site=[f"h{i // 4}" for i in range(24)],
        scanner="A",
        ish=["", "positive"] * 12,
    )
)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda b: b * np.nan, "slide 1: features are not finite"),
        (lambda b: b.astype(np.float64) * 1e39, "not finite in float32"),
        (lambda b: b[:, :7], "slide 1: 7 features per patch, 12 are expected"),
        (lambda b: b[:0], r"slide 1: features have shape \(0, 12\)"),
        (lambda b: b[0], "slide 1: features have shape"),
        (lambda b: b.astype(str), "slide 1: features have shape .* and type <U"),
        (lambda b: b * 1j, "type complex64"),
    ],
)
def test_predict_and_training_refuse_the_same_features(spoil, said):
    bags = [*ARMS["a"]]
    model = fit_mil(bags, Y, QUICK)
    bags[1] = spoil(bags[1])
    with pytest.raises(TrainingError, match=said):
        predict(model, bags)
    with pytest.raises(TrainingError, match=said.replace("slide 1", "slide s1")):
        cross_validate({"a": bags}, COHORT, QUICK, n_folds=3)
    with pytest.raises(TrainingError, match=said):
        fit_mil(bags, Y, QUICK)


def test_a_cohort_whose_bags_all_have_another_length_is_refused_by_prediction():
    model = fit_mil(ARMS["a"], Y, QUICK)
    with pytest.raises(TrainingError, match="slide 0: 5 features per patch, 12 are expected"):
        predict(model, [b[:, :5] for b in ARMS["a"]])
    with pytest.raises(ValueError, match=r"\(1, 3, 5\), this model reads \(bags, patches, 12 features\)"):
        model(torch.zeros(1, 3, 5))


@pytest.mark.parametrize(
    "y, said",
    [
        ((Y - 1), r"labels \[-1, 0, 1, 2\], allowed are 0 to 3"),
        (Y + 0.5, "allowed are 0 to 3"),
        (np.where(Y == 0, np.nan, Y), r"nan\], allowed"),
        (Y.astype(str), "allowed are 0 to 3"),
        (Y[:-1], r"24 slides and labels of shape \(23,\)"),
        (Y[:, None], r"labels of shape \(24, 1\)"),
    ],
)
def test_labels_that_are_no_class_are_refused(y, said):
    with pytest.raises(TrainingError, match=said):
        fit_mil(ARMS["a"], y, QUICK)


@pytest.mark.parametrize(
    "rows",
    [np.array([0, 24]), np.array([-1, 2]), Y > 0, np.array([0.0, 1.0])],
    ids=["beyond", "negative", "mask", "float"],
)
def test_rows_that_are_no_positions_are_refused(rows):
    with pytest.raises(TrainingError, match="not positions from 0 to 23"):
        fit_stack(ARMS, [Member("a", rows, Y)], QUICK)


@pytest.mark.parametrize(
    "y, options, said",
    [
        (np.maximum(Y, 1), {}, "3 folds need 3 patients of each score, the main cohort has 0: 0, 1.: 12, 2.: 6, 3.: 6"),
        (Y, dict(n_folds=7), "7 folds need 7 patients of each score"),
        (Y, dict(inner=5), "5 inner folds need 5 training patients of each score, 3 folds .* leave 4"),
        (Y, dict(inner=1), "inner is 1"),
        (Y, dict(n_folds=2.5), "n_folds is 2.5"),
        (Y, dict(folds_by="hospital"), "folds_by is 'hospital'"),
        (Y - 1, {}, "allowed are 0 to 3"),
    ],
)
def test_a_cohort_that_cannot_be_cross_validated_is_refused_in_terms_of_all_scores(y, options, said):
    with pytest.raises(TrainingError, match=said):
        cross_validate(ARMS, COHORT.assign(y=y), QUICK, **{"n_folds": 3, **options})


def test_one_patient_alone_is_refused():
    with pytest.raises(TrainingError, match="patients of each score, the main cohort has"):
        cross_validate(ARMS, COHORT.assign(patient_id="p"), QUICK, n_folds=2)


def test_a_final_model_without_one_score_says_so():
    with pytest.warns(UserWarning, match=r"without any slide of class \[0\]"):
        fit_mil(ARMS["a"], np.maximum(Y, 1), QUICK)


def test_unlabelled_external_slides_are_predicted():
    some = COHORT.assign(cohort=np.where(np.arange(24) < 20, "main", "external"), y=np.where(np.arange(24) < 20, Y, -1))
    assert set(cross_validate(ARMS, some, QUICK, n_folds=2).query("split == 'external'").y) == {-1}


def test_two_classes_train_as_four_do():
    table = cross_validate(
        ARMS,
        COHORT.assign(y=Y % 2),
        TrainConfig(**{**vars(QUICK), "n_classes": 2, "ordinal": True}),
        n_folds=3,
        permutations=(0, 1),
    )
    assert [c for c in table if c[0] in "lp" and c[-1].isdigit()] == ["logit0", "logit1", "p0", "p1"]
    assert np.allclose(table.p0 + table.p1, 1)


def test_the_table_carries_site_scanner_and_ish_and_folds_keep_sites_whole():
    table = cross_validate(
        {("a", 3): ARMS["a"], training.Arm("b, max", "b", 1, "max pooling"): ARMS["b"]},
        COHORT,
        QUICK,
        n_folds=3,
        folds_by="site",
    )
    assert set(zip(table.arm, table.embedder, table.pretrain_seed, table.variant)) == {
        ("a", "a", 3, ""),
        ("b, max", "b", 1, "max pooling"),
    }
    assert set(table.folds_by) == {"site"} and set(table.scanner) == {"A"} and set(table.ish) == {"", "positive"}
    assert (table[table.split == "test"].groupby("site").fold.nunique() == 1).all()
    assert set(cross_validate(ARMS, COHORT.drop(columns=["scanner", "ish"]), QUICK, n_folds=3).ish) == {""}


def test_permutations_share_folds_and_scores_of_each_fold_but_not_labels():
    table = cross_validate({"a": ARMS["a"]}, COHORT, QUICK, n_folds=3, permutations=range(1, 11), splits=("test",))
    runs = {name: t.sort_values("slide_id") for name, t in table.groupby("run")}
    folds = {tuple(t.fold) for t in runs.values()}
    assert len(runs) == 10 and len(folds) == 2 and len({tuple(t.y) for t in runs.values()}) == 10
    for t in runs.values():
        assert (t.groupby(["fold", "y"]).size() == 2).all()
    apart = cross_validate(
        {"a": ARMS["a"]}, COHORT, QUICK, n_folds=3, repeats=2, permutations=range(1, 4), splits=("test",)
    )
    assert all(t.groupby("slide_id").y.nunique().max() == 1 for _, t in apart.groupby("run"))
    assert len({tuple(t.sort_values("slide_id").fold) for _, t in apart.groupby(["run", "repeat"])}) == 6


def test_members_that_share_bags_train_as_they_would_alone():
    rows, cfg = np.arange(3, 24), TrainConfig(**{**vars(QUICK), "double": True})
    for bags in (ARMS["a"], [b[:30] for b in _bags(2, low=30)]):
        members = [Member("a", rows, np.random.default_rng(k).permutation(Y), (1,)) for k in range(5)]
        together, alone = fit_stack({"a": bags}, members, cfg), [fit_stack({"a": bags}, [m], cfg)[0] for m in members]
        assert _largest_difference(together, alone) < 1e-10


def test_a_run_that_was_stopped_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    options = dict(n_folds=3, repeats=2, permutations=(0, 1, 9), folder=tmp_path, return_history=True)
    plain = cross_validate(ARMS, COHORT, QUICK, **{**options, "folder": None})
    fit, calls = training.fit_stack, []

    def stops(*args, **kw):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args, **kw)

    monkeypatch.setattr(training, "fit_stack", stops)
    with pytest.raises(KeyboardInterrupt):
        cross_validate(ARMS, COHORT, QUICK, **options)
    resumed = cross_validate(ARMS, COHORT, QUICK, **options)
    assert len(calls) == 3 + 4
    for p, q in zip(plain, resumed):
        pd.testing.assert_frame_equal(p, q)
    cross_validate({**ARMS, "a": [b + 1 for b in ARMS["a"]]}, COHORT, QUICK, **options)
    assert len(calls) == 7 + 6


def test_workers_change_nothing():
    one, two = (cross_validate(ARMS, COHORT, QUICK, n_folds=3, n_jobs=n) for n in (1, 2))
    pd.testing.assert_frame_equal(one, two)


EDITS = {
    "_fit": (
        "stack",
        "torch.optim.AdamW(_groups(params.items(), cfg, 3)",
        "torch.optim.AdamW(_groups(params.items(), cfg, 2)",
    ),
    "_Attend": ("stack", "w[i] @ u", "w[i] @ u*1"),
    "a default": ("members", "epochs: int = 15", "epochs: int = 16"),
    "AttentionMIL._pool": ("mil", "t = self._read(self.V, h, raw).tanh()", "t = self._read(self.V, h, raw).sin()"),
    "patient_folds": ("folds", "rng.permutation(n_folds)", "rng.permutation(n_folds)[::-1]"),
}
NO_EDITS = {
    "a comment": ("training", "import copy\n", "import copy\n# nothing\n"),
    "plot_losses": ("training", "ls='--', lw=.8)", "ls=':', lw=.8)"),
}


@pytest.mark.parametrize("edit", [*EDITS, *NO_EDITS])
def test_the_key_of_a_predictions_table_knows_the_code_that_makes_it(edit, tmp_path):
    module, old, new = {**EDITS, **NO_EDITS}[edit]
    shutil.copytree(Path(training.__file__).parent, tmp_path / "her2_mil", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "her2_mil" / f"{module}.py"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    hashed = code_sha256(cross_validate)
    reached = _reached(_library(tmp_path / "her2_mil", "training"), {"cross_validate"})
    got = hashlib.sha256("\n".join(sorted(set(reached))).encode()).hexdigest()
    assert (got != hashed) == (edit in EDITS)


def test_importing_training_does_not_import_fastai():
    "In a process of its own: this one has it already"
    code = "import sys, her2_mil.training; assert 'fastai' not in sys.modules; from her2_mil.training import fine_tune"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_arm_says_who_it_is_whatever_its_name():
    with pytest.raises(TrainingError, match="names no arm"):
        cross_validate({3: ARMS["a"]}, COHORT, QUICK, n_folds=3)
    keys = [
        "a",
        ("a", 1),
        training.Arm("a", "alexnet", 2),
        training.Arm("a, mean pooling", "alexnet", 0, "mean pooling"),
    ]
    table = cross_validate({k: ARMS["a"] for k in keys}, COHORT, QUICK, n_folds=3, repeats=2, splits=("test",))
    seen = table[["arm", "embedder", "pretrain_seed", "variant"]].drop_duplicates().itertuples(index=False, name=None)
    want = [("a", "a", 0, ""), ("a", "a", 1, ""), ("a", "alexnet", 2, "")]
    assert list(seen) == [*want, ("a, mean pooling", "alexnet", 0, "mean pooling")]
    assert (table.groupby(["arm", "pretrain_seed", "repeat"]).size() == 24).all()


def test_patches_that_cannot_be_fine_tuned_are_refused():
    for bags, y, said in [
        ([p[:0] for p in PATCHES], Y[:8], "slide 0: patches have shape"),
        ([p / 255 for p in PATCHES], Y[:8], "type float64"),
        (PATCHES, Y[:7], "8 slides and labels"),
        (PATCHES, Y[:8] + 1, "allowed are 0 to 3"),
    ]:
        with pytest.raises(TrainingError, match=said):
            fine_tune(_Tiny(), bags, y, SMALL, log=None)
