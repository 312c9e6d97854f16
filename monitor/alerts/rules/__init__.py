"""The alert rules, a class each. Formulas, reasons and error rates: docs/alerts.md.

To add a rule: a class in the file of its subject, a row in RULES, a test. Nothing else.
"""

from monitor.alerts.rules.base import Finding, Rule
from monitor.alerts.rules.entropy import EntropyCollapse, EntropyExplosion, NonfiniteEntropy
from monitor.alerts.rules.outcome import DiversityLost, GeneralizationGap, NoLearningSignal, RewardLost
from monitor.alerts.rules.selection import BlindSelection
from monitor.alerts.rules.shape import EntropyFlow, Forgetting, PeakSharpening, TailNoise
from monitor.alerts.rules.text import Repetition, TruncationRunaway
from monitor.alerts.rules.update import ClipSaturation, GradientSpikes, KlRunaway, NonfiniteLoss, SamplerMismatch

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        EntropyCollapse, EntropyExplosion, RewardLost, DiversityLost, NoLearningSignal, BlindSelection,
        GeneralizationGap, Forgetting, TailNoise, PeakSharpening, EntropyFlow, TruncationRunaway, Repetition, KlRunaway,
        SamplerMismatch, ClipSaturation, GradientSpikes, NonfiniteEntropy, NonfiniteLoss,
    )
}  # fmt: skip
DEFAULT_RULES: tuple[Rule, ...] = tuple(rule() for rule in RULES.values())

__all__ = ["DEFAULT_RULES", "RULES", "Finding", "Rule"]
