from __future__ import annotations

import pytest
from tiny import tiny_policy

from trainer.policy.policy import Policy


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()
