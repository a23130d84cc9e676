"""The scikit-learn estimators: scikit-learn's own checks, adaptation measured, and what goes in and out."""

from __future__ import annotations

import pickle

import fresh
import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastda.sklearn import CORALClassifier, DANNClassifier, PrototypeClassifier

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFIERS = [
    CORALClassifier(epochs=3, random_state=0),
    DANNClassifier(epochs=3, random_state=0),
    PrototypeClassifier(),
]
FOLDS = KFold(2, shuffle=True, random_state=0)  # both domains in each part
each_classifier = pytest.mark.parametrize("classifier", CLASSIFIERS, ids=lambda c: type(c).__name__)


def shifted(seed: int = 0, samples: int = 300, shift: str = "sheared"):
    """Three clouds, those of the target sheared or rotated by 55 degrees: features, true labels, domains."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(samples) % 3, 2)
    if shift == "sheared":
        X = np.eye(3)[labels] + 0.2 * rng.normal(size=(2 * samples, 3))
        transform = np.array([[1.0, 2, 0], [0, 1, 0], [0, 0, 1]])
    else:
        angles, turn = 2 * np.pi * labels / 3, np.deg2rad(55)
        X = 2 * np.stack([np.cos(angles), np.sin(angles)], 1) + 0.4 * rng.normal(size=(2 * samples, 2))
        transform = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    X[samples:] = X[samples:] @ transform
    return X, labels, np.repeat([1, -1], samples)


@parametrize_with_checks([CORALClassifier(epochs=10), DANNClassifier(epochs=10), PrototypeClassifier()])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


# Means of five seeds, of which three are drawn here, source alone and adapted: CORAL 0.66 and 0.97, DANN 0.80 and 0.87,
# prototypes 0.67 and 1.00.
# CORAL sees no rotation of clouds whose covariance is round, and prototypes follow no class that passes by another.
@pytest.mark.parametrize(
    ("classifier", "shift", "margin"),
    [
        (CORALClassifier(random_state=0), "sheared", 0.15),
        (DANNClassifier(random_state=0), "rotated", 0.03),
        (PrototypeClassifier(), "rotated", 0.15),
    ],
    ids=lambda value: type(value).__name__,
)
def test_adaptation_beats_the_source_alone(classifier, shift, margin):
    gains = []
    for seed in range(3):
        X, y, domains = shifted(seed, shift=shift)
        source, target = domains > 0, domains < 0
        alone = clone(classifier).fit(X[source], y[source]).score(X[target], y[target])
        adapted = clone(classifier).fit(X, np.where(source, y, -1), sample_domain=domains)
        gains.append((alone, adapted.score(X[target], y[target])))
    alone, adapted = np.mean(gains, axis=0)
    assert adapted > alone + margin, gains


@each_classifier
def test_labels_of_the_target_are_not_looked_at(classifier):
    X, y, domains = shifted()
    names = np.array(["cat", "dog", "owl"])[y]
    expected = clone(classifier).fit(X, names, sample_domain=domains).predict_proba(X)
    for mask in ("?", None, np.nan):
        masked = names.astype(object)
        masked[domains < 0] = mask
        found = clone(classifier).fit(X, masked, sample_domain=domains)
        assert found.classes_.tolist() == ["cat", "dog", "owl"]
        np.testing.assert_array_equal(found.predict_proba(X), expected)


@each_classifier
def test_numbers_masked_by_nan_stay_numbers(classifier):
    X, y, domains = shifted()
    found = clone(classifier).fit(X, np.where(domains > 0, y, np.nan), sample_domain=domains)
    np.testing.assert_array_equal(found.classes_, [0, 1, 2])


@each_classifier
def test_fitting_leaves_the_random_states_as_they_are(classifier):
    X, y, domains = shifted()
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    clone(classifier).fit(X, y, sample_domain=domains)
    assert np.random.rand() == expected


@each_classifier
def test_pickled_after_adaptation(classifier):
    X, y, domains = shifted()
    fitted = clone(classifier).fit(X, y, sample_domain=domains)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))


@each_classifier
def test_the_same_random_state_gives_the_same_classifier(classifier):
    X, y, domains = shifted()
    first, second = (clone(classifier).fit(X, y, sample_domain=domains).predict_proba(X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    if not isinstance(classifier, PrototypeClassifier):
        other = clone(classifier).set_params(random_state=1).fit(X, y, sample_domain=domains)
        assert (other.predict_proba(X) != first).any()


@each_classifier
def test_in_a_pipeline_and_a_grid_search(classifier):
    X, y, domains = shifted(samples=90)
    name = type(classifier).__name__.lower()
    parameter = "refinements" if isinstance(classifier, PrototypeClassifier) else "epochs"
    with sklearn.config_context(enable_metadata_routing=True):
        routed = clone(classifier).set_fit_request(sample_domain=True)
        pipeline, grid = make_pipeline(StandardScaler(), routed), {f"{name}__{parameter}": [1, 3]}
        search = GridSearchCV(pipeline, grid, cv=FOLDS, error_score="raise")
        search.fit(X, y, sample_domain=domains)
        unrouted = clone(classifier).set_params(**search.best_estimator_[-1].get_params())
    expected = unrouted.fit(StandardScaler().fit_transform(X), y, sample_domain=domains)
    np.testing.assert_array_equal(search.predict_proba(X), expected.predict_proba(StandardScaler().fit_transform(X)))


def test_partial_fit_is_fit_of_all_samples():
    X, y, domains = shifted()
    X, y = X[domains > 0], y[domains > 0]
    order = np.argsort(y, kind="stable")  # so that classes come one after the other
    classifier = PrototypeClassifier()
    for part in np.array_split(order, 7):
        classifier.partial_fit(X[part], y[part], classes=[0, 1, 2])
        assert set(classifier.predict(X)) <= set(y[order[: classifier.class_count_.sum()]])
        np.testing.assert_allclose(classifier.predict_proba(X).sum(1), 1)
    whole = PrototypeClassifier().fit(X, y)
    np.testing.assert_allclose(classifier.prototypes_, whole.prototypes_, rtol=1e-12)
    with pytest.raises(ValueError, match="y: expected one of .* pass all to the first call"):
        classifier.partial_fit(X[:1], [7])


@each_classifier
@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ([1, -1], "sample_domain: expected one number for each of the 4 samples"),
        (["a", "a", "b", "b"], "sample_domain: expected one number"),
        ([1, 1, 0, 0], "sample_domain: expected positive numbers for the source and negative"),
        ([-1, -1, -1, -1], "sample_domain: expected samples of the source"),
    ],
)
def test_domains_that_cannot_be_told_apart(classifier, domains, message):
    with pytest.raises(ValueError, match=message):
        clone(classifier).fit(np.eye(4), [0, 1, 0, 1], sample_domain=domains)


@each_classifier
def test_labels_that_are_missing(classifier):
    with pytest.raises(ValueError, match="y: expected a label for each sample of the source, got NaN"):
        clone(classifier).fit(np.eye(3), [0, np.nan, np.nan], sample_domain=[1, 1, -1])
    with pytest.raises(ValueError, match="y: expected labels of the source, got None"):
        clone(classifier).fit(np.eye(3), None, sample_domain=[1, 1, -1])


def test_too_few_samples_for_a_covariance():
    with pytest.raises(ValueError, match="X: expected at least 2 samples of each domain .*got 1 of the target"):
        CORALClassifier().fit(np.eye(4), [0, 1, 0, 1], sample_domain=[1, 1, 1, -1])
    with pytest.raises(ValueError, match="batch_size: expected at least 2"):
        CORALClassifier(batch_size=1).fit(np.eye(4), [0, 1, 0, 1], sample_domain=[1, 1, -1, -1])


@pytest.mark.parametrize(
    ("classifier", "error", "message"),
    [
        (CORALClassifier(hidden_layer_sizes=()), ValueError, "hidden_layer_sizes: expected at least one layer"),
        (DANNClassifier(hidden_layer_sizes=(0,)), ValueError, "hidden_layer_sizes: expected at least 1, got 0"),
        (DANNClassifier(epochs=1.5), TypeError, "epochs: expected an int"),
        (PrototypeClassifier(metric="manhattan"), ValueError, "metric: expected one of"),
        (PrototypeClassifier(temperature=0.0), ValueError, "temperature: expected a number"),
        (PrototypeClassifier(refinements=-1), ValueError, "refinements: expected at least 0"),
    ],
)
def test_parameters_out_of_bounds(classifier, error, message):
    with pytest.raises(error, match=message):
        classifier.fit(np.eye(4), [0, 1, 0, 1], sample_domain=[1, 1, -1, -1])


def test_without_scikit_learn_the_extra_is_named(tmp_path):
    program = "import sys; sys.modules['sklearn'] = None; import fastda; import fastda.sklearn"
    done = fresh.python("-c", program, cwd=tmp_path)
    assert done.returncode != 0
    assert "pip install 'fastda-kernels[sklearn]'" in done.stderr
