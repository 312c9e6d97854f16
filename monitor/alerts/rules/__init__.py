"""The alert rules, a class each. Formulas, reasons and error rates: docs/alerts.md.

To add a rule: a class in the file of its subject, a row in RULES, a test. Nothing else.
"""

from monitor.alerts.rules.base import Finding, Rule
from monitor.alerts.rules.entropy import EntropyCollapse, EntropyExplosion, NonfiniteEntropy

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (EntropyCollapse, EntropyExplosion, NonfiniteEntropy)}
DEFAULT_RULES: tuple[Rule, ...] = tuple(rule() for rule in RULES.values())

__all__ = ["DEFAULT_RULES", "RULES", "Finding", "Rule"]
