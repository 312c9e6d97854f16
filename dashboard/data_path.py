"""How the launcher tells the server which store to show: kept apart from data.py so that launching imports little."""

STORE_VARIABLE = "RLVR_STORE"
