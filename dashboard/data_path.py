"""How the launcher tells the server which store to show. Apart from data.py, so that launching imports little."""

STORE_VARIABLE = "RLVR_STORE"
