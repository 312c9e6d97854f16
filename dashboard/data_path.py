"""How the launcher tells the server what to show. Apart from data.py, so that launching imports little."""

STORE_VARIABLE = "RLVR_STORE"
ALERTS_VARIABLE = "RLVR_DASHBOARD_ALERTS"  # the alerts file whose routes the Alerts page shows; unset: none
