"""Source and target, told apart in the arrays that `fit` gets."""

from __future__ import annotations

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d, validate_data

DTYPES = (np.float64, np.float32)


def split_domains(estimator, X, y, sample_domain) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of the source, its labels, and features of the target, which may be none."""
    if sample_domain is None:
        X, y = validate_data(estimator, X, y, dtype=DTYPES)
        check_classification_targets(y)
        return X, y, X[:0]
    if y is None:
        raise ValueError("y: expected labels of the source, got None; pass any value for the samples of the target")
    X = validate_data(estimator, X, dtype=DTYPES)
    y = column_or_1d(y, warn=True)
    check_consistent_length(X, y)
    is_source = _is_source(sample_domain, len(X))
    labels = np.array(y[is_source].tolist())  # of the type that they have without the mask of the target
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("y: expected a label for each sample of the source, got NaN or infinity; leave these out")
    check_classification_targets(labels)
    return X[is_source], labels, X[~is_source]


def _is_source(sample_domain, num_samples: int) -> np.ndarray:
    domains = np.asarray(sample_domain)
    if domains.shape != (num_samples,) or domains.dtype.kind not in "iuf":
        raise ValueError(
            f"sample_domain: expected one number for each of the {num_samples} samples, got shape {domains.shape} of "
            f"{domains.dtype}; pass a positive one for samples of the source and a negative one for the target's"
        )
    if not (np.abs(domains) > 0).all():
        raise ValueError(
            "sample_domain: expected positive numbers for the source and negative ones for the target, got 0 or NaN; "
            "pass 1 and -1"
        )
    if not (domains > 0).any():
        raise ValueError(
            "sample_domain: expected samples of the source, marked by positive numbers, got none; add labelled ones"
        )
    return domains > 0
