"""Deep CORAL and DANN as scikit-learn classifiers: a small network, trained by `fastda.training.fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from ..methods import DANN, DeepCORAL, Method, SourceOnly
from ..nn import DomainDiscriminator
from ..reference import checks
from ..schedules import dann_lambda
from ..training import Batches, fit, random_states
from .domains import DTYPES, split_domains


class AdaptedNetwork(ClassifierMixin, BaseEstimator):
    """What both classifiers share; a subclass makes the method that trains the network."""

    def fit(self, X, y, sample_domain=None):
        """Train on source samples, and adapt to those of the target if there are any.

        Args:
            X: (N, D), the features of both domains.
            y: (N,), labels of any type; those of the target are not looked at.
            sample_domain: (N,), positive for the source and negative for the target; None if all are the source's.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: parameters or data that do not fit; each says what to do.
        """
        source, labels, target = split_domains(self, X, y, sample_domain)
        sizes = tuple(checks.whole_number("hidden_layer_sizes", size, 1) for size in self.hidden_layer_sizes)
        if not sizes:
            raise ValueError("hidden_layer_sizes: expected at least one layer to adapt, got none; pass (64,)")
        checks.whole_number("batch_size", self.batch_size, 1)
        self.classes_, indices = np.unique(labels, return_inverse=True)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with random_states.seeded(seed):
            network = self._network(sizes)
            method = self._method(*network) if len(target) else SourceOnly(*network)
            least = method.least_samples
            for name, count in (("source", len(source)), ("target", len(target) or least), ("batch", self.batch_size)):
                if count < least:
                    raise ValueError(
                        f"{'batch_size' if name == 'batch' else 'X'}: expected at least {least} samples of each domain "
                        f"at a time, got {count} of the {name}; pass more"
                    )
            self.history_ = fit(
                method,
                Batches(self.batch_size, _tensor(source), torch.from_numpy(indices.astype(np.int64))),
                Batches(self.batch_size, _tensor(target)) if len(target) else None,
                epochs=self.epochs,
                lr=self.lr,
                weight_decay=self.weight_decay,
                progress=self.progress,
                device=self.device,
            ).history
            trained = self._network(sizes)  # free of the hooks that a method may have left, which are not pickled
            for part, fitted in zip(trained, network, strict=True):
                part.load_state_dict({name: value.cpu() for name, value in fitted.state_dict().items()})
        self.network_ = nn.Sequential(*trained).double().eval()  # so that a sample's answer is the same in any batch
        return self

    def predict_proba(self, X) -> np.ndarray:
        """(N, C) probabilities of the classes, in the order of `classes_`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=DTYPES, reset=False)
        with torch.no_grad():
            return self.network_(torch.tensor(X, dtype=torch.float64)).softmax(1).numpy()

    def predict(self, X) -> np.ndarray:
        """(N,) the most probable class of each sample."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]

    def _network(self, sizes: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
        widths = (self.n_features_in_, *sizes)
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers), nn.Linear(widths[-1], len(self.classes_))

    def _method(self, feature_extractor: nn.Module, label_predictor: nn.Module) -> Method:
        raise NotImplementedError


def _tensor(X: np.ndarray) -> Tensor:
    return torch.tensor(X, dtype=torch.float32)


class CORALClassifier(AdaptedNetwork):
    """A fully connected network trained by Deep CORAL: the covariances of both domains' features are made to agree.

    Bring the features to about unit variance first, such as with a `StandardScaler` in a pipeline; with metadata
    routing `set_fit_request(sample_domain=True)` sends `sample_domain` through.

    Args:
        hidden_layer_sizes: units of each hidden layer; the last one's are the features that are aligned.
        weight: α of the CORAL loss, a number or a function of the progress of training, 0 to 1.
        epochs: passes over the longer domain.
        lr: learning rate of SGD with momentum 0.9.
        batch_size: samples of each domain in a step; CORAL takes at least 2.
        weight_decay: of the weights, not of the biases.
        random_state: a seed, a `RandomState` or None.
        device: as in :func:`fastda.training.fit`; prediction is on the CPU.
        progress: True for a progress bar (tqdm), None for one where a terminal shows it.

    Attributes:
        classes_: (C,), the labels of the source, sorted.
        network_: the trained network, from features to logits.
        history_: the losses of each epoch.
        n_features_in_: D.

    Source: Sun & Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV workshops 2016.

    Example:
        >>> import numpy as np
        >>> from fastda.sklearn import CORALClassifier
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(200) % 2
        >>> source = rng.normal(size=(200, 2)) / 4 + np.stack([y, -y], 1)
        >>> X, domains = np.concatenate([source, 2 * source]), np.repeat([1, -1], 200)
        >>> masked = np.where(domains > 0, np.tile(y, 2), -1)
        >>> classifier = CORALClassifier(epochs=20, random_state=0).fit(X, masked, sample_domain=domains)
        >>> classifier.score(2 * source, y) > 0.9
        True
    """

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (64,),
        *,
        weight: float | Callable[[float], float] = 1000.0,
        epochs: int = 50,
        lr: float = 0.1,
        batch_size: int = 64,
        weight_decay: float = 1e-3,
        random_state=None,
        device: torch.device | str | None = None,
        progress: bool | None = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.weight = weight
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.device = device
        self.progress = progress

    def _method(self, feature_extractor: nn.Module, label_predictor: nn.Module) -> Method:
        return DeepCORAL(feature_extractor, label_predictor, weight=self.weight)


class DANNClassifier(AdaptedNetwork):
    """A fully connected network trained by DANN: its features are trained against a classifier of the domains.

    Bring the features to about unit variance first, such as with a `StandardScaler` in a pipeline; with metadata
    routing `set_fit_request(sample_domain=True)` sends `sample_domain` through.

    Args:
        hidden_layer_sizes: units of each hidden layer; the last one's are the features that are aligned.
        lambd: λ of the gradient reversal, a number or a function of the progress of training; by default the paper's,
            which rises from 0 to 1.
        weight: of the domain classifier's loss, for itself and the features alike.
        domain_hidden_features: units of the domain classifier's one hidden layer.
        epochs, lr, batch_size, weight_decay, random_state, device, progress: as in :class:`CORALClassifier`; one sample
            of each domain is enough for a step.

    Attributes:
        classes_: (C,), the labels of the source, sorted.
        network_: the trained network, from features to logits.
        history_: the losses of each epoch.
        n_features_in_: D.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> import numpy as np
        >>> from fastda.sklearn import DANNClassifier
        >>> rng = np.random.default_rng(0)
        >>> y = np.arange(200) % 2
        >>> source = rng.normal(size=(200, 2)) / 4 + np.stack([y, -y], 1)
        >>> X, domains = np.concatenate([source, 2 * source]), np.repeat([1, -1], 200)
        >>> masked = np.where(domains > 0, np.tile(y, 2), -1)
        >>> classifier = DANNClassifier(epochs=20, random_state=0).fit(X, masked, sample_domain=domains)
        >>> classifier.score(2 * source, y) > 0.9
        True
    """

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (64,),
        *,
        lambd: float | Callable[[float], float] = dann_lambda,
        weight: float | Callable[[float], float] = 1.0,
        domain_hidden_features: int = 64,
        epochs: int = 50,
        lr: float = 0.1,
        batch_size: int = 64,
        weight_decay: float = 1e-3,
        random_state=None,
        device: torch.device | str | None = None,
        progress: bool | None = False,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.lambd = lambd
        self.weight = weight
        self.domain_hidden_features = domain_hidden_features
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.weight_decay = weight_decay
        self.random_state = random_state
        self.device = device
        self.progress = progress

    def _method(self, feature_extractor: nn.Module, label_predictor: nn.Module) -> Method:
        discriminator = DomainDiscriminator(
            label_predictor.in_features, self.domain_hidden_features, num_layers=2, dropout=0.0
        )
        return DANN(feature_extractor, label_predictor, discriminator, lambd=self.lambd, weight=self.weight)
