"The stack against separate and plain training, threads, learning curves, callbacks."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from her2_mil import training
from her2_mil.evaluation import plot_learning
from her2_mil.mil import AttentionMIL, TorchmilAdapter
from her2_mil.training import Member, TrainConfig, TrainingError, cross_validate, fine_tune, fit_mil, fit_stack, predict

QUICK = TrainConfig(epochs=2, batches=3, bag_size=20, width=8, lr=.01, attention_lr=1.)
Y = np.arange(24) % 4


def _bags(seed, low=3, high=40, dim=12):
    "Bags of which some are shorter than a bag of 20 and some longer"
    rng = np.random.default_rng(seed)
    return [rng.normal(.2*s, 1, (rng.integers(low, high), dim)).astype(np.float32) for s in Y]


def _members():
    return [Member(arm, np.setdiff1d(np.arange(24), np.arange(k, 24, 4 + k)), Y, (k,)) for k in range(3) for arm in "ab"]


ARMS = {"a": _bags(0), "b": _bags(1)}


def _largest_difference(some, others):
    return max((p - q).abs().max().item() for m, n in zip(some, others) for p, q in zip(m.state_dict().values(), n.state_dict().values()))


KINDS = [dict(), dict(heads=2), dict(per_score=True), dict(ordinal=True), dict(balance="weights", label_smoothing=.1), dict(balance="sampler"), dict(redraw=False)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_attention_by_hand_trains_as_the_module_itself(kind, monkeypatch):
    cfg = TrainConfig(**{**vars(QUICK), "double": True, **kind})
    by_hand = fit_stack(ARMS, _members(), cfg)
    monkeypatch.setattr(training, "_attend", lambda *args: None)
    assert _largest_difference(by_hand, fit_stack(ARMS, _members(), cfg)) < 1e-10


@pytest.mark.parametrize("kind", [*KINDS, dict(gated=True), dict(project=5), dict(pooling="mean"), dict(pooling="max"), dict(pooling="top")], ids=str)
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
    watching = fit_stack(ARMS, [Member(m.arm, m.rows, m.y, m.key, watch=np.setdiff1d(np.arange(24), m.rows)) for m in _members()], QUICK)
    assert _largest_difference(plain, watching) == 0
    assert np.isnan(plain[0].watched).all() and len(watching[0].watched) == QUICK.epochs
    out = np.setdiff1d(np.arange(24), _members()[0].rows)
    logits = torch.from_numpy(predict(watching[0], [ARMS["a"][i] for i in out]))
    assert watching[0].watched[-1] == pytest.approx(nn.functional.cross_entropy(logits, torch.from_numpy(Y[out])).item(), abs=1e-5)


def test_history_is_drawn_by_plot_learning():
    cohort = pd.DataFrame(dict(slide_id=[f"s{i}" for i in range(24)], patient_id=[f"p{i}" for i in range(24)], y=Y, cohort="main", site=""))
    table, history = cross_validate(ARMS, cohort, QUICK, n_folds=3, seeds=(0, 1), inner=2, return_history=True)
    assert {"arm", "seed", "fold", "epoch", "train_loss", "test_loss"} <= set(history)
    assert len(history) == 2*2*3*QUICK.epochs and history.notna().all(axis=None)
    ax = plot_learning(history, values=("train_loss", "test_loss"))
    drawn = [line for line in ax.lines if len(line.get_xdata())]
    assert len(drawn) == 2*2*3*2
    pd.testing.assert_frame_equal(table, cross_validate(ARMS, cohort, QUICK, n_folds=3, seeds=(0, 1), inner=2))


class _Tiny:
    "Eight features of a small convolutional network, with the interface of an Embedder"
    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def normalise(self, x):
        return (x if torch.is_tensor(x) else torch.from_numpy(x).permute(0, 3, 1, 2).float()/255) - .5

    def __call__(self, x):
        with torch.no_grad():
            return self.module(self.normalise(x)).numpy()


PATCHES = [np.random.default_rng(i).integers(0, 255, (8, 16, 16, 3)).astype(np.uint8) for i in range(8)]
SMALL = TrainConfig(epochs=2, bag_size=4, width=4, dropout=0.)


def test_fine_tune_logs_to_csv_by_default_and_calls_a_callback(tmp_path, monkeypatch):
    class Count(Callback):
        calls = 0

        def after_epoch(self): self.calls += 1

    monkeypatch.chdir(tmp_path)
    count = Count()
    fine_tune(_Tiny(), PATCHES, Y[:8], SMALL, cbs=[count])
    assert count.calls == SMALL.epochs
    assert len(pd.read_csv(tmp_path / "fine_tune.csv")) == SMALL.epochs


def test_fine_tune_takes_fastais_tensorboard_callback(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from fastai.callback.tensorboard import TensorBoardCallback
    fine_tune(_Tiny(), PATCHES, Y[:8], SMALL, log=None, cbs=[TensorBoardCallback(tmp_path, trace_model=False, log_preds=False)])
    assert list(tmp_path.rglob("events*"))


@pytest.mark.parametrize("name, normalised", [("ABMIL", False), ("TransMIL", True)])
def test_a_torchmil_model_trains_behind_the_adapter(name, normalised):
    zoo = pytest.importorskip("torchmil.models", reason="torchmil is not installed: pip install torchmil")
    torch.manual_seed(0)
    model = TorchmilAdapter(getattr(zoo, name)(in_shape=(12,), att_dim=16), normalised=normalised)
    x, y = torch.from_numpy(np.stack([b[:8] for b in _bags(0, low=8)])), torch.from_numpy(Y)
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=.01), []
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
