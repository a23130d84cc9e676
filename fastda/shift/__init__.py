"""What kind of shift is this, how large is it, and what should be done about it."""

from .advice import SCENARIOS, Recommendation, Scenario, Step, recommend
from .distances import CORALDistance, ProxyADistance, coral_distance, proxy_a_distance
from .feature_tests import FeatureTests, feature_tests
from .kinds import diagnose
from .label_shift import LabelShift, estimate_label_shift
from .mmd import MMD, mmd
from .report import Confidence, ShiftReport, Test
from .reweighting import ConceptDrift

__all__ = [
    "MMD",
    "SCENARIOS",
    "CORALDistance",
    "ConceptDrift",
    "Confidence",
    "FeatureTests",
    "LabelShift",
    "ProxyADistance",
    "Recommendation",
    "Scenario",
    "ShiftReport",
    "Step",
    "Test",
    "coral_distance",
    "diagnose",
    "estimate_label_shift",
    "feature_tests",
    "mmd",
    "proxy_a_distance",
    "recommend",
]
